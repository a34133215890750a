"""megafab: pretraining on Megatron-core and DeepSpeed through one loop. Start reading at `train.py`."""

__version__ = "0.1.0"
