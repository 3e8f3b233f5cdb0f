"""What the analyses of tokens are made from: several models' scores of the same held-out tokens."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTokens:
    """One model on the tokens. All [n, s] float32, 0 where masked."""

    nll: np.ndarray
    """Nats."""
    kl: np.ndarray
    """KL(reference || model) over the whole vocabulary, nats."""
    weight: np.ndarray
    """ReMiT's weight of the token in this model's loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The reference and other models on n samples of s label positions."""

    set_name: str
    tokens: np.ndarray
    """[n, s] int32 ids of the labels."""
    mask: np.ndarray
    """[n, s] bool, True where a token counts."""
    reference_nll: np.ndarray
    """[n, s] float32, nats; 0 where masked."""
    models: dict[str, ModelTokens]
    sources: dict[str, str]
    """Name of each model, `reference` among them, -> its checkpoint."""

    def margin(self, name: str) -> np.ndarray:
        """log p_reference - log p_model of each token [n, s], nats: above 0 where the reference is more confident."""
        return self.models[name].nll - self.reference_nll
