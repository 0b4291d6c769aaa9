"""Model FLOPs: what the mathematics of a step needs, whatever the implementation recomputes."""

from moetron.moe.config import derived
from moetron.moe.config.settings import Settings
from moetron.moe.plan.parameters import count_parameters


def flops_per_token(settings: Settings, vocab_size: int) -> int:
    """FLOPs of one token's forward and backward pass.

    ``6 N + 6 L S A``: N active parameters in matrix products (the padded output layer and the
    router included, embedding look-up and norms not), L layers, S sequence length, A heads x
    channels.
    A product costs 2 FLOPs a parameter forward and twice that backward. Attention's two products
    cost 4 S A forward over the whole sequence; a causal mask leaves half, and that half is counted.
    """
    model = settings.model
    count = count_parameters(settings, vocab_size)
    looked_up = count.parts["embedding"] if model.untie_embeddings_and_output_weights else 0
    products = count.active - count.parts["norms"] - looked_up
    attention = model.num_layers * model.seq_length * model.num_attention_heads
    return 6 * products + 6 * attention * derived.head_dim(model)
