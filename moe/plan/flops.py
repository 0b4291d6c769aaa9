"""Model FLOPs of a step, without recomputation."""

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings
from moetron.moe.plan.parameters import count_parameters, norms_ahead


def flops_per_token(settings: Settings, vocab_size: int) -> int:
    """Return the FLOPs of one token's forward and backward pass.

    ``6 N + 3 L S A (w + v)``: N active parameters in matrix products (including the padded output
    layer and the router, excluding embedding look-up and norms), L layers, S sequence length, A
    heads, w and v the channels of a query head and of a value head. A product costs 2 FLOPs per
    parameter forward and twice that backward. Attention's two products cost 2 S A (w + v) forward
    over the full sequence, of which the causal half is counted. A multi-token prediction module
    adds its projection, its layer and the output layer.
    """
    model = settings.model
    count, ahead = count_parameters(settings, vocab_size), model.mtp_num_layers or 0
    looked_up = count.parts["embedding"] if model.untie_embeddings_and_output_weights else 0
    products = count.active - count.parts["norms"] - looked_up
    matrix = derived.padded_vocab_size(vocab_size, settings) * model.hidden_size
    products += count.active_ahead - norms_ahead(settings) + ahead * matrix
    attention = (model.num_layers + ahead) * model.seq_length * model.num_attention_heads
    return 6 * products + 3 * attention * sum(derived.attention_widths(settings))
