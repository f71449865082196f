"""A frozen decoder's parts in fewer sweeps are the model's own; training's loss runs through them too."""

import pytest
import torch
from torch import nn
from transformers.activations import GELUTanh
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from families import EXTRA, FAMILIES, stir_norms, tiny_model
from prefixtune.attachment import packed
from prefixtune.attachment.head import decoder_of
from prefixtune.attachment.lean import lean

ALIKE = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral-sliding",
    "llama-yarn",
    "llama-llama3",
    "gemma",
    "gemma2",
    "gemma3",
)


def own_forwards(decoder):
    return [module for module in decoder.modules() if "forward" in vars(module)]


def states_and_gradient(decoder, embedded):
    states = decoder(inputs_embeds=embedded * 1, use_cache=False).last_hidden_state  # CTRL scales it in place
    weights = torch.linspace(-1, 1, states.numel(), dtype=torch.float32).view(states.shape)
    return states.detach().float(), torch.autograd.grad((states.float() * weights).sum(), embedded)[0].float()


def embedded_for(base, dtype):
    width = base.get_input_embeddings().embedding_dim
    made = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(3))
    return made.to(dtype).requires_grad_()


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(pytest.param(family, torch.float32, id=family) for family in FAMILIES + EXTRA),
        *(pytest.param(family, torch.bfloat16, id=f"{family}-bfloat16") for family in ALIKE),
    ],
)
def test_states_and_gradient_are_the_models_own(family, dtype):
    base = tiny_model(family).requires_grad_(False).to(dtype)
    decoder, tolerance = decoder_of(base), 1e-5 if dtype == torch.float32 else 0.05
    stir_norms(base)
    embedded = embedded_for(base, dtype)
    expected = states_and_gradient(decoder, embedded)
    with lean(decoder):
        taken = len(own_forwards(decoder))
        found = states_and_gradient(decoder, embedded)
    assert own_forwards(decoder) == []
    assert taken > 0 or family not in ALIKE
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize(
    ("family", "norms"), [("llama", 2), ("qwen3", 4), ("gemma", 2), ("gemma2", 4), ("gemma3", 6)]
)
def test_norms_activations_and_rotary_embeddings_of_each_layer_take_part(family, norms):
    decoder = decoder_of(tiny_model(family).requires_grad_(False))
    with lean(decoder):
        layers = decoder.config.num_hidden_layers
        assert len(own_forwards(decoder)) == layers * (norms + 2) + 1


def test_packs_run_so_and_nothing_else_does():
    base = tiny_model("llama").requires_grad_(False)
    decoder, ids = decoder_of(base), torch.arange(9)[None] + 3
    seen = []
    decoder.layers[0].register_forward_pre_hook(lambda *_: seen.append(len(own_forwards(decoder))))
    with torch.no_grad(), packed(base, None, (4, 5)) as hidden_of:
        seen.clear()  # what finds out the model's shapes
        hidden_of(ids)
    with torch.no_grad():
        base(input_ids=ids)
    assert seen == [2 * 4 + 1, 0]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_backward_pass_keeps_less(family):
    base = tiny_model(family).requires_grad_(False)
    kept = []

    def size_of_kept():
        kept.append(0)

        def keep(tensor):
            kept[-1] += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            decoder_of(base)(inputs_embeds=embedded_for(base, torch.float32), use_cache=False)

    size_of_kept()
    with lean(decoder_of(base)):
        size_of_kept()
    assert kept[1] < 0.9 * kept[0]


@pytest.mark.parametrize("activation", [nn.GELU(), GELUTanh(use_gelu_tanh_python=True)])
def test_what_is_trained_or_replaced_runs_as_it_always_does(activation):
    decoder = decoder_of(tiny_model("llama").requires_grad_(False))
    first, second = decoder.layers
    first.input_layernorm.weight.requires_grad_(True)
    second.mlp.act_fn = activation
    second.self_attn.forward = own = second.self_attn.forward  # as accelerate's hooks do
    with lean(decoder):
        assert second.self_attn.forward is own
        assert "forward" in vars(first.self_attn)
        for module in (first.input_layernorm, second.mlp):
            assert "forward" not in vars(module)
    assert own_forwards(decoder) == [second.self_attn]


class Shifted(GemmaRMSNorm):
    """Gemma's norm but for what its forward calls."""

    def _norm(self, x):
        return super()._norm(x) + 1


def test_a_norm_is_gemmas_in_both_its_parts():
    decoder = decoder_of(tiny_model("gemma").requires_grad_(False))
    decoder.norm = Shifted(decoder.config.hidden_size).requires_grad_(False)
    with lean(decoder):
        assert "forward" not in vars(decoder.norm)
        assert "forward" in vars(decoder.layers[0].input_layernorm)


def test_a_model_in_float64_runs_as_it_always_does():
    decoder = decoder_of(tiny_model("llama").requires_grad_(False).double())
    with lean(decoder):
        assert own_forwards(decoder) == []


def test_an_exception_leaves_no_forward_behind():
    decoder = decoder_of(tiny_model("llama").requires_grad_(False))
    with pytest.raises(RuntimeError, match="stop"), lean(decoder):
        raise RuntimeError("stop")
    assert own_forwards(decoder) == []
