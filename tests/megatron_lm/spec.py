"""`--spec tests.megatron_lm.spec layer`: this package's layer, whose attention does context parallelism without TE."""

from types import SimpleNamespace
from typing import Any

from remit_megatron.mcore.families import pre_norm

plain: Any = SimpleNamespace(qk_norm="none")
layer = pre_norm.layer_spec(plain, use_te=False)
