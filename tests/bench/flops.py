"""Count the operations of a model's matrix products: a share of a machine's peak is reckoned from them."""

from __future__ import annotations

from psycopref.models.packs import unwrap

Segments = list[tuple[int, int]]  # (queries, keys) of each piece of text; a query sees all keys up to its own


def forward_flops(model, segments: Segments, outputs: int = 0) -> int:
    """Count a forward pass: linear layers, attention, and the head; not embeddings, norms and softmax.

    model: Llama-like decoder of transformers, bare or in peft, without sliding windows and experts; outputs: states
    that reach the head."""
    layers, (head, _) = _products(model, segments, outputs)
    return sum(linear + attention for linear, attention, _ in layers) + head


def training_flops(model, segments: Segments, outputs: int = 0, reference: bool = False) -> int:
    """Count a forward and a backward pass of what is trained; nothing is computed twice.

    reference: one forward pass more, for DPO; others as in forward_flops."""
    layers, (head, head_weight) = _products(model, segments, outputs)
    found = (1 + reference) * forward_flops(model, segments, outputs) + head + head_weight
    begun = unwrap(model).get_input_embeddings().weight.requires_grad
    for linear, attention, weights in layers:
        begun = begun or weights > 0  # no gradient goes below the first layer that is trained
        found += weights + (linear + 2 * attention) * begun
    return found


def _products(model, segments: Segments, outputs: int) -> tuple[list[tuple[int, int, int]], tuple[int, int]]:
    "Count by layer (linear, attention, gradients of weights), and for the head (forward, gradient of its weight)."
    from torch.nn import Linear

    own = unwrap(model)
    config, tokens = own.config.get_text_config(), sum(queries for queries, _ in segments)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    seen = sum(queries * (keys - queries) + queries * (queries + 1) // 2 for queries, keys in segments)
    layers = []
    for layer in own.base_model.layers:
        weights = [module.weight for module in layer.modules() if isinstance(module, Linear)]
        linear, trained = (
            sum(2 * tokens * weight.numel() for weight in weights if weight.requires_grad or not only)
            for only in (False, True)
        )
        layers.append((linear, 4 * config.num_attention_heads * size * seen, trained))
    weight = (getattr(own, "score", None) or own.get_output_embeddings()).weight
    head = 2 * outputs * weight.numel()
    return layers, (head, head * weight.requires_grad)
