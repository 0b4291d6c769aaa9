"""Model FLOPs of a step, without recomputation."""

from moetron.moe.config.schema import derived
from moetron.moe.config.schema.settings import Settings
from moetron.moe.plan.parameters import active, count_parameters, layer, norms_ahead


def flops_per_token(settings: Settings, vocab_size: int) -> int:
    """Return the FLOPs of one token's forward and backward pass.

    ``6 N + 3 L S A (w + v)``: N active parameters in matrix products (including the padded output
    layer and the router, excluding embedding look-up and norms), L layers, S sequence length, A
    heads, w and v the channels of a query head and of a value head. A product costs 2 FLOPs per
    parameter forward and twice that backward. Attention's two products cost 2 S A (w + v) forward
    over the full sequence, of which the causal half is counted. A multi-token prediction module
    adds its projection, its layer and the output layer.
    """
    if settings.model.encoder_num_layers is not None:
        return _of_stacks(settings, vocab_size)
    model = settings.model
    count, ahead = count_parameters(settings, vocab_size), model.mtp_num_layers or 0
    looked_up = count.parts["embedding"] if model.untie_embeddings_and_output_weights else 0
    products = count.active - count.parts["norms"] - looked_up
    matrix = derived.padded_vocab_size(vocab_size, settings) * model.hidden_size
    products += count.active_ahead - norms_ahead(settings) + ahead * matrix
    attention = (model.num_layers + ahead) * model.seq_length * model.num_attention_heads
    return 6 * products + 3 * attention * sum(derived.attention_widths(settings))


def _of_stacks(settings: Settings, vocab_size: int) -> int:
    """Return the same for an encoder-decoder: the mean over the tokens of a sample.

    A layer and its attention count the tokens of its own stack, keys and values of cross-attention
    those of the encoder, and the output layer those of the decoder. The decoder's self-attention
    counts its causal half, the encoder's and cross-attention all pairs.
    """
    model, lengths = settings.model, derived.stack_lengths(settings)
    keys, queries = lengths["encoder"], lengths["decoder"]
    inner = model.num_attention_heads * derived.head_dim(model)
    flops = 6 * queries * derived.padded_vocab_size(vocab_size, settings) * model.hidden_size
    pattern = derived.moe_layers(settings)
    for stack, layers in derived.stack_layers(model).items():
        pairs = keys**2 if stack == "encoder" else queries**2 // 2 + queries * keys
        for index in layers:
            tensors = [t for t in layer(settings, pattern[index]) if t.part != "norms"]
            flops += 6 * active(settings, tensors) * lengths[stack] + 12 * pairs * inner
            if stack == "decoder":
                flops += 12 * (queries + keys) * model.hidden_size * inner
    return flops // model.seq_length
