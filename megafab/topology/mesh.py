"""Rank arithmetic of the parallel axes, without torch.distributed, so that `plan` and tests can use it.

Ranks are numbered with the tensor axis fastest, then context, then data, then pipeline: Megatron's order
`tp-cp-ep-dp-pp`. Expert parallel ranks are a subset of the data x context ranks of one pipeline stage.
"""

from __future__ import annotations

from dataclasses import dataclass

from megafab.topology.config import ParallelConfig


@dataclass(frozen=True, slots=True)
class Mesh:
    """The axes' sizes and, from them, where a rank stands."""

    ranks: int
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    expert: int = 1
    virtual_pipeline: int = 1

    @staticmethod
    def of(config: ParallelConfig, ranks: int) -> Mesh:
        """The mesh of a configuration on `ranks` ranks (the rules have checked that it divides)."""
        return Mesh(
            ranks, config.tensor, config.context, config.pipeline, config.expert, config.virtual_pipeline
        )

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one replica of the model: tensor x context x pipeline."""
        return self.tensor * self.context * self.pipeline

    @property
    def data(self) -> int:
        """Data parallel size: how many replicas read different samples."""
        return self.ranks // self.model_parallel

    def tensor_rank(self, rank: int) -> int:
        """Which slice of each split weight the rank holds."""
        return rank % self.tensor

    def context_rank(self, rank: int) -> int:
        """Which part of each sequence the rank holds."""
        return rank // self.tensor % self.context

    def data_rank(self, rank: int) -> int:
        """Which samples the rank reads."""
        return rank // (self.tensor * self.context) % self.data

    def pipeline_rank(self, rank: int) -> int:
        """Which stage of layers the rank holds."""
        return rank // (self.tensor * self.context * self.data)

    def rank_of(self, *, tensor: int = 0, context: int = 0, data: int = 0, pipeline: int = 0) -> int:
        """The rank at these coordinates."""
        return tensor + self.tensor * (context + self.context * (data + self.data * pipeline))

    def layers_of(self, layers: int, pipeline: int, chunk: int = 0) -> range:
        """Global layer numbers (from 0) of one model chunk of a pipeline rank.

        Chunks of the interleaved schedule go round the pipeline: chunk c of rank p is the
        (c x pipeline + p)-th of pipeline x virtual_pipeline equal parts (Narayanan et al. 2021).
        """
        part = layers // (self.pipeline * self.virtual_pipeline)
        first = (chunk * self.pipeline + pipeline) * part
        return range(first, first + part)

    def describe(self) -> str:
        """`tensor 2 x pipeline 2 x data 1`, with the axes of size one left out but data."""
        named = [
            ("tensor", self.tensor),
            ("context", self.context),
            ("pipeline", self.pipeline),
            ("data", self.data),
        ]
        text = " x ".join(f"{name} {size}" for name, size in named if size > 1 or name == "data")
        if self.virtual_pipeline > 1:
            text += f", {self.virtual_pipeline} model chunks a stage"
        return text + (f", expert {self.expert}" if self.expert > 1 else "")
