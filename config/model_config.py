"""The architecture of a model made from scratch (``model_name="embedded"``)."""

from __future__ import annotations

from pydantic import model_validator

from config.declaration import Declaration, Fraction, PositiveFloat, PositiveInt, declared, option


@declared
class ModelConfig(Declaration):
    """A Qwen3-type decoder; the defaults are a 12-layer model, :meth:`tiny` is what demos and tests use."""

    hidden_size: PositiveInt = option(
        default=768, meaning="Width of the residual stream, in units (d_model)."
    )
    num_attention_heads: PositiveInt = option(
        default=12, meaning="Query heads per layer; must divide hidden_size."
    )
    num_key_value_heads: PositiveInt | None = option(
        default=None,
        meaning="Key/value heads per layer, a divisor of the query heads; none = as many as query heads.",
    )
    num_layers: PositiveInt = option(default=12, meaning="Transformer blocks.")
    intermediate_size: PositiveInt | None = option(
        default=None, meaning="Width of the gated MLP, in units; none = 4 × hidden_size."
    )
    max_position_embeddings: PositiveInt = option(
        default=2048, meaning="Longest sequence promised, in tokens."
    )
    rope_theta: PositiveFloat = option(default=10000.0, meaning="Base of the rotary position frequencies.")
    dropout: Fraction = option(
        default=0.1,
        meaning="Recorded in config.json as attention_dropout for programs that honour it; mlx-lm's models, and so "
        "our training, have none.",
    )
    layer_norm_eps: PositiveFloat = option(
        default=1e-5, meaning="Added to the variance in RMS normalisation (epsilon)."
    )
    init_std: PositiveFloat = option(default=0.02, meaning="Standard deviation of freshly drawn weights.")

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        kv = self.num_key_value_heads
        if kv is not None and self.num_attention_heads % kv:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({kv})"
            )
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"hidden_size / num_attention_heads is {self.hidden_size // self.num_attention_heads}, "
                "and rotary positions need it even"
            )
        return self

    @classmethod
    def tiny(cls) -> ModelConfig:
        """About 0.3 million parameters: learns character-level tasks in seconds on two CPU cores."""
        return cls(
            hidden_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_layers=3,
            intermediate_size=256,
            max_position_embeddings=512,
        )
