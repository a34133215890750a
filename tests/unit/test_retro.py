"""RETRO by hand: sizes, masks, passages, overlaps; live retrieval against neighbours given by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import write_corpus

from megafab.data.config import Packing
from megafab.data.packing import Passages, pack, put_in_front
from megafab.model.config import Activation, ModelConfig, Norm, Position, RetroConfig
from megafab.model.names import is_gate, is_maskable, is_retro, parameter_shapes
from megafab.model.shape import ModelShape

MODEL = ModelConfig(
    name="m", layers=3, hidden=16, heads=4, kv_heads=2, ffn=24, seq_len=12, vocab=32, vocab_multiple=1
)
RETRO = RetroConfig(chunk=4, neighbors=2, retrieved=6, encoder_layers=2, layers=[1, 3])


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        *((1, (1,)), (2, (1,)), (4, (2,)), (5, (3,)), (6, (6,)), (12, (6, 9, 12)), (15, (6, 9, 12, 15))),
        *((16, (9, 12, 15)), (32, (9, 12, 15, 18, 21, 24, 27, 30))),
    ],
)
def test_every_third_layer_from_the_sixth_looks(layers: int, expected: tuple[int, ...]) -> None:
    """From the ninth on in models of more than 15 layers, as Megatron-LM's; from the middle on below six."""
    config = dataclasses.replace(MODEL, layers=layers, retro=RetroConfig(chunk=4))
    assert tuple(layer + 1 for layer in ModelShape.of(config).retro_layers) == expected
    assert ModelShape.of(dataclasses.replace(config, retro=RetroConfig())).retro_layers == ()


def test_parameters_by_hand() -> None:
    plain, retro = ModelShape.of(MODEL), ModelShape.of(dataclasses.replace(MODEL, retro=RETRO))
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16  # queries, keys and values of half the heads, projection
    looking = attention + 16  # and a norm
    encoder = 2 * (attention + 3 * 16 * 24 + 2 * 16) + looking + 16
    assert retro.parameters - plain.parameters == 2 * looking + encoder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            **{"position": Position.learned, "norm": Norm.layernorm, "bias": True, "qk_norm": True},
            **{"activation": Activation.gelu, "tied_embeddings": True},
        },
    ],
    ids=["llama", "gpt"],
)
def test_names_and_shapes_add_up(changes: dict[str, object]) -> None:
    shape = ModelShape.of(dataclasses.replace(MODEL, retro=RETRO, **changes))
    shapes = parameter_shapes(shape)
    assert sum(int(np.prod(size)) for size in shapes.values()) == shape.parameters
    plain = parameter_shapes(ModelShape.of(dataclasses.replace(MODEL, **changes)))
    assert {name for name in shapes if is_retro(name)} == shapes.keys() - plain.keys()
    gates = [name for name in shapes if is_gate(name)]
    assert gates == [f"decoder.layers.{n}.cross_attention.linear_proj.weight" for n in (0, 2)]
    assert not any(is_retro(name) and is_gate(name) and is_maskable(name) for name in plain)


def test_flops_by_hand() -> None:
    plain, retro = ModelShape.of(MODEL), ModelShape.of(dataclasses.replace(MODEL, retro=RETRO))
    ratio = 2 * 6 / 4  # retrieved tokens of a token of the sequence
    queries_and_projection, keys_and_values = 2 * 16 * 16, 2 * 16 * 8
    looking = 2 * (queries_and_projection + ratio * keys_and_values) + 4 * 16 * 2 * 6
    layer = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24) + 4 * 16 * 6  # attention over the neighbour
    at_chunk = ratio * (2 * queries_and_projection + 4 * 16 * 4) + 2 * keys_and_values
    extra = 2 * looking + ratio * 2 * layer + at_chunk
    assert retro.flops_per_token() - plain.flops_per_token() == pytest.approx(3 * extra)
    for recompute, again in (("full", extra), ("selective", 2 * 4 * 16 * 12 + ratio * 4 * 16 * (2 * 6 + 4))):
        found = retro.flops_per_token(recompute=recompute) - plain.flops_per_token(recompute=recompute)
        assert found == pytest.approx(3 * extra + again)


def mask_of(rank: int, world: int, documents: list[list[int]], lengths: list[list[list[int]]]):
    from megafab.model.retro import retrieval_mask
    from megafab.run import Retrieved

    length_BCK = torch.tensor(lengths)
    retrieved = Retrieved(torch.zeros(*length_BCK.shape, 4, dtype=torch.int64), length_BCK)
    return retrieval_mask(torch.tensor(documents), retrieved).int().tolist()


def test_who_may_look_at_what(ranks) -> None:
    """Two chunks of 3; the second document begins at position 4; the first chunk has one neighbour of two."""
    ((mask,),) = ranks.run(mask_of, [[0, 0, 0, 0, 1, 1]], [[[3, 0], [0, 0]]])
    # Tokens of the neighbours; positions 2, 3, 4 look at those of chunk 0; the chunk is of their document.
    assert mask[0] == [1, 1, 1, 0, 0, 0, 0, 0] + [1, 1, 0] + [1, 1, 1]
    # Nothing was retrieved for chunk 1, whose last token is of the second document.
    assert mask[1] == [0] * 8 + [0, 0, 0] + [0, 1, 1]


def test_a_passage_is_one_document_with_the_beginning_of_its_window() -> None:
    window, starts = np.array([[5, 6, 0, 7, 8]]), np.array([[False, False, False, True, False]])
    packed = pack(window, starts, Packing.document)
    rows = put_in_front(Passages(np.array([[21, 22, 0]]), np.array([2])), packed)
    assert rows.tokens_BL.tolist() == [[21, 21, 22, 5, 6, 0, 7]]
    assert rows.document_BL.tolist() == [[0, 1, 1, 1, 1, 1, 2]]
    assert rows.position_BL.tolist() == [[0, 0, 1, 2, 3, 4, 0]]
    assert rows.loss_mask_BL.tolist() == [[0, 0, 0, *packed.loss_mask_BL[0].tolist()]]
    assert rows.labels_BL.tolist()[0][3:] == packed.labels_BL.tolist()[0]


def test_without_a_passage_the_window_is_what_it_was() -> None:
    window, starts = np.array([[5, 6, 0, 7, 8]]), np.array([[False, False, False, True, False]])
    packed = pack(window, starts, Packing.document)
    rows = put_in_front(Passages(np.array([[0, 0, 0]]), np.array([0])), packed)
    assert rows.position_BL.tolist()[0][3:] == packed.position_BL.tolist()[0]
    assert rows.document_BL.tolist()[0] == [0, 0, 0, 1, 1, 1, 2]
    assert not rows.loss_mask_BL[0, :3].any()


def runs_of(rank: int, world: int, ours: np.ndarray, theirs: np.ndarray) -> list[int]:
    from megafab.perplexity import longest_runs

    return longest_runs(ours, theirs).tolist()


def test_the_longest_run_that_two_texts_share(ranks) -> None:
    ours = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [7, 7, 7, 7]])
    theirs = np.array([[9, 2, 3, 4, 1, 2], [4, 3, 2, 1, 4, 3], [-1] * 6, [7, 7, 5, 7, 7, 7]])
    assert ranks.run(runs_of, ours, theirs) == [[3, 1, 0, 3]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from launch import retrieval

    root, draw = tmp_path_factory.mktemp("live") / "corpus", np.random.default_rng(3)
    documents = [np.append(draw.integers(1, 32, length), 0) for length in draw.integers(5, 40, 60)]
    write_corpus(root, {"text": documents}, {"text": documents[:5]}, vocab_size=32)
    assert retrieval.main([f"path={root}", "chunk=4", "neighbors=4", "candidates=12", "workers=1"]) == 0
    return root


def test_windows_are_read_with_their_neighbors(corpus: Path) -> None:
    """Both splits, every window, against the rows of the file and the tokens of the corpus."""
    from megafab.data.format import Corpus
    from megafab.data.loader import WindowReader
    from megafab.data.retrieval import Neighbors
    from megafab.data.retrieved import Retrieval

    opened = Corpus.open(corpus)
    neighbors = Neighbors.open("tfidf-4", opened, 4)
    retrieval = Retrieval(neighbors, 2, 6)
    for split in ("train", "valid"):
        reader = WindowReader(opened, split, 12, Packing.document, retrieval=retrieval)
        windows = np.arange(reader.windows_D[0])
        batch = reader.read(np.zeros_like(windows), windows, windows)
        assert batch.retrieved is not None
        for window in windows.tolist():
            rows = neighbors.read(split, 0, window * 12, 3, count=2).reshape(-1)
            tokens, lengths = neighbors.database.read(rows, 6)
            assert torch.equal(batch.retrieved.tokens_BCKR[window].flatten(0, 1), torch.from_numpy(tokens))
            assert batch.retrieved.length_BCK[window].flatten().tolist() == lengths.tolist()
        assert bool((batch.retrieved.length_BCK > 0).any())


def test_a_window_begins_with_what_the_chunk_before_it_retrieved(corpus: Path) -> None:
    from megafab.data.format import Corpus
    from megafab.data.loader import WindowReader
    from megafab.data.retrieval import Neighbors
    from megafab.data.retrieved import Retrieval, Shown

    opened = Corpus.open(corpus)
    neighbors, stream = Neighbors.open("tfidf-4", opened, 4), opened.domain("train", 0)
    retrieval = Retrieval(neighbors, 1, 8, in_context=True)
    reader = WindowReader(opened, "train", 4, Packing.document, retrieval=retrieval)
    windows = np.arange(reader.windows_D[0])
    batch = reader.read(np.zeros_like(windows), windows, windows)
    assert batch.tokens_BL.shape == (len(windows), 12)
    seen = 0
    for window in windows.tolist():
        starts = np.concatenate([[0], stream.document_starts(0, stream.tokens)])
        passage = batch.tokens_BL[window, :8][batch.document_BL[window, :8] == 1]
        if window * 4 in starts:
            assert not len(passage), "another document"
            continue
        rows = neighbors.read("train", 0, window * 4 - 4, 2, count=1)[0]
        tokens, lengths = neighbors.database.read(rows, 8)
        assert passage.tolist() == tokens[0, : lengths[0]].tolist()
        seen += bool(len(passage))
    assert seen > 20
    none = dataclasses.replace(retrieval, shown=Shown.none)
    reader = WindowReader(opened, "train", 4, Packing.document, retrieval=none)
    assert not bool((reader.read(np.zeros_like(windows), windows, windows).document_BL[:, :8] != 0).any())


@pytest.mark.parametrize("in_context", [False, True], ids=["", "passage in context"])
def test_live_retrieval_gives_the_model_the_neighbors_of_whole_chunks(
    corpus: Path, in_context: bool, ranks
) -> None:
    """Text as it grows, also beyond the window: the logits are those of the model given by hand what the
    database finds for each whole chunk."""
    (differing,) = ranks.run(differing_from_none, corpus, in_context, init=False)
    assert differing > 10, "neighbours must have made a difference"


def differing_from_none(rank: int, world: int, corpus: Path, in_context: bool) -> int:
    """How many logits of growing text neighbours have changed."""
    from megafab.data.format import Corpus
    from megafab.data.retrieval import Neighbors
    from megafab.data.retrieved import Retrieval
    from megafab.model import plan as model_plan
    from megafab.model.attention import attention_mask
    from megafab.model.retro import retrieval_mask
    from megafab.model.tags import tag_all
    from megafab.platform import platform
    from megafab.retrieval import LiveRetrieval
    from megafab.run import Retrieved
    from megafab.topology import groups as topology
    from megafab.topology.config import ContextMethod
    from megafab.topology.mesh import Mesh

    platform.start(0, 1)
    passage = 8 if in_context else 0
    config = dataclasses.replace(
        MODEL, seq_len=12 + passage, retro=dataclasses.replace(RETRO, retrieved=8, in_context=in_context)
    )
    groups = topology.initialize(Mesh(1), seed=1)
    plan = model_plan.plan(
        *(ModelShape.of(config), groups),
        **{"precision": torch.float32, "recompute": "none", "sequence_parallel": False},
        context_method=ContextMethod.allgather,
    )
    (model,) = model_plan.build(plan, groups, 1)
    model.eval()
    with torch.no_grad():
        for tagged in tag_all([model], groups):
            if is_gate(tagged.name):
                tagged.parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(2))
        database = Neighbors.open("tfidf-4", Corpus.open(corpus), 4)
        ids = np.random.default_rng(9).integers(1, 32, 19).tolist()
        live = LiveRetrieval(Retrieval(database, 2, 8, in_context), config.seq_len, ids[:5])
        differing = 0
        for count in range(5, 20):
            found = live.logits(model, ids[:count])
            first = max(0, -(-(count - 12) // 4)) * 4
            window = ids[first:count] + [0] * (-(count - first) % 4)
            rows = np.full((len(window) // 4, 2), -1)
            for chunk in range((count - first) // 4):
                rows[chunk] = database.database.search([np.array(window[chunk * 4 : chunk * 4 + 4])], 2)[0]
            begin: list[int] = []
            if in_context:
                row = database.database.search([np.array(ids[1:5])], 2)[0][:1]
                tokens, lengths = database.database.read(row, 8)
                begin = tokens[0, : lengths[0]].tolist()
                rows = np.concatenate([np.full((2, 2), -1), rows])
            left = passage - len(begin)
            tokens, lengths = database.database.read(rows.reshape(-1), 8)
            retrieved = Retrieved(
                torch.from_numpy(tokens.reshape(1, -1, 2, 8)), torch.from_numpy(lengths.reshape(1, -1, 2))
            )
            text = torch.tensor([[0] * left + begin + window])
            documents = torch.tensor([[0] * left + [1] * (len(begin) + len(window))])
            positions = torch.tensor([[0] * left + list(range(len(begin) + len(window)))])
            arguments = (text, positions, attention_mask(documents))
            expected = model(
                *arguments, retrieved=retrieved, retrieval_mask=retrieval_mask(documents, retrieved)
            )
            place = passage + count - first - 1
            torch.testing.assert_close(found, expected[0, place], rtol=1e-5, atol=1e-5)
            without = model(*arguments)
            differing += not torch.allclose(found, without[0, place], rtol=1e-4, atol=1e-4)
    topology.shutdown()
    return differing
