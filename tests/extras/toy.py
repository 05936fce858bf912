"""The pair tiny, in toy size."""

from settings import Pair

TOY_PAIR = Pair(
    {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    target_lr=1e-3,
    lr=2e-3,
)
