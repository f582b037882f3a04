"""Infini-attention in models of Hugging Face's transformers, 5.17 and later.

`convert` gives a model Infini-attention in place of its attention, `load` reads what such a model's
`save_pretrained` wrote. Both know Llama, Mistral, Qwen2 and Qwen3.
"""

import sys
import threading
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.masking_utils import flash_attention_mask
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from . import Problem, infini_attention
from .nn import Gated, last_columns, rotation_of_embeddings
from .torch import State

__all__ = ["InfiniCache", "InfiniCacheLayer", "convert", "load"]

# Of the attention implementation, and of the settings in a model's configuration.
NAME = "infini_attention"
CONVERTED = "that of a converted model"


def convert(
    model,
    segment_len: int = 2048,
    *,
    update: str = "delta",
    empty_memory: str = "bypass",
    gate: float = -4.0,
):
    """Gives a model Infini-attention in place of its attention, and returns it.

    Projections stay what they are; every attention module gets gate logits `beta`, float32 [Hq]. The
    settings go into `model.config`, from where `load` has them.

    Parameters
    ----------
    model
        A model of transformers whose attention is LlamaAttention, MistralAttention, Qwen2Attention or
        Qwen3Attention, without sliding windows.
    segment_len, update, empty_memory
        As in infini_attention. With "bypass" a converted model computes for the first segment_len tokens
        what it computed before.
    gate : float
        What the gate logits begin with. sigmoid(-4) = 0.018 of what a head gives is then the memory's,
        which the model was not trained with; -inf is attention within segments alone.

    Raises
    ------
    ValueError
        For a model without such modules, and for features that Infini-attention has not, by name. The
        model is as it was then.
    """
    modules = [m for m in model.modules() if type(m) in CLASSES]
    if not modules:
        names = ", ".join(base.__name__ for base in CLASSES)
        raise ValueError(f"model: {type(model).__name__} given, one with modules of {names} expected")
    settings = {"segment_len": segment_len, "update": update, "empty_memory": empty_memory, "gate": gate}
    for module in modules:
        check_config(module.config, settings)
        if "forward" in vars(module):  # Which the new class would not replace.
            raise ValueError("model: attention with a forward of its own given (a hook?), none expected")
    for module in modules:
        setattr(module.config, NAME, settings)
        module.__class__ = CLASSES[type(module)]
        module.start()
    return model


def load(path, *, model_class=AutoModelForCausalLM, **options):
    """A converted model that `save_pretrained` wrote, with its gates.

    `path` and `options` are those of `from_pretrained`, and `model_class` is whose. What was never
    converted loads as usual and is given to `convert`.

    Raises
    ------
    ValueError
        For a checkpoint of another kind, or one that lacks gates.
    """
    with patched():
        model, info = model_class.from_pretrained(path, output_loading_info=True, **options)
    modules = [m for m in model.modules() if isinstance(m, InfiniModule)]
    missing = sorted(key for key in info["missing_keys"] if key.endswith(".beta"))
    if missing or not modules:
        lacking = missing or "gates"
        raise ValueError(f"path: a checkpoint without {lacking} given, {CONVERTED} expected")
    for module in modules:
        module.beta._no_weight_decay = True  # Loading makes parameters anew.
    return model


_patches = threading.Lock()
_inside = 0


@contextmanager
def patched():
    """Models that are made inside have Infini-attention if their configuration says so, others not. (The
    mapping of transformers for this would also change what models made later record.)"""
    global _inside
    with _patches:
        _inside += 1
        for base, ours in CLASSES.items():
            setattr(sys.modules[base.__module__], base.__name__, by_configuration(base, ours))
    try:
        yield
    finally:
        with _patches:
            _inside -= 1
            for base in CLASSES if _inside == 0 else ():
                setattr(sys.modules[base.__module__], base.__name__, base)


def by_configuration(base, ours):
    """A class in the place of an attention module's, whose instances are of one of the two."""

    class Either(base):
        def __new__(cls, config, *args, **options):
            if cls is not Either:
                return super().__new__(cls)
            return (ours if getattr(config, NAME, None) else base)(config, *args, **options)

    return Either


def check_config(config, settings: dict) -> None:
    """Refuses what Infini-attention does not compute."""
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    for name, given, expected in [
        ("config.sliding_window", getattr(config, "sliding_window", None), None),
        ("config.layer_types", layer_types, {"full_attention"}),
        ("config.is_causal", getattr(config, "is_causal", True), True),
    ]:
        if given != expected:
            raise ValueError(f"{name}: {given} given, {expected} expected: there are segments instead")
    policies = dict(settings)
    gate = policies.pop("gate")
    if not isinstance(gate, (int, float)) or gate != gate:
        raise ValueError(f"gate: {gate!r} given, a number expected")
    # Which says what is wrong with them.
    Problem(heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, key_dim=1, **policies)


class InfiniModule(Gated):
    """What replaces an attention module: its projections, and the operator for the rest."""

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if not hasattr(config, NAME):
            raise ValueError(f"config: one without {NAME} given, {CONVERTED} expected")
        check_config(config, getattr(config, NAME))
        self.start()

    def start(self) -> None:
        """What a module has besides those of the class it replaces."""
        settings = dict(getattr(self.config, NAME))
        self.add_gate(self.config.num_attention_heads, settings.pop("gate"), self.q_proj.weight.device)
        self.policies = settings
        # Models then hand out the padding of a call's tokens instead of a mask of scores.
        self.config._attn_implementation = NAME

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **options,
    ) -> tuple[torch.Tensor, None]:
        batch, tokens = hidden_states.shape[:2]
        cache = past_key_values if cache is None else cache
        self.check_call(cache, attention_mask, options)
        q, k, v = self.project(hidden_states)
        call = {
            "q": q, "k": k, "v": v, "beta": self.beta, "scale": self.scaling,
            "attention_mask": last_columns(attention_mask, batch, tokens),
            **rotation_of_embeddings(position_embeddings, batch, tokens),
            **self.policies,
        }
        if cache is None:
            out = infini_attention(**call, return_state=False)
        else:
            out = cache_layer(cache, self.layer_idx).advance(call)
        return self.o_proj(out.flatten(-2)), None

    def project(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """q, k and v, [B, T, H, D], of one element type."""
        q, k, v = (
            getattr(self, name)(hidden_states).unflatten(-1, (-1, self.head_dim))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if hasattr(self, "q_norm"):  # Qwen3
            q, k = self.q_norm(q), self.k_norm(k)
        return [x.to(v.dtype) for x in (q, k, v)]

    def check_call(self, cache, mask, options: dict) -> None:
        """Refuses what would be ignored."""
        if self.training and self.attention_dropout:
            given = self.attention_dropout
            raise ValueError(f"attention_dropout: {given} given, 0 expected in training")
        if options.get("output_attentions"):
            raise ValueError("output_attentions: True given, False expected: there are no such weights")
        packed = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k") if options.get(name) is not None]
        at = options.get("position_ids")
        # Of padded rows, too, places may be in any order.
        if cache is None and mask is None and self.layer_idx == 0 and at is not None:
            packed += ["position_ids"] if (at.diff(dim=-1) != 1).any() else []
        if packed:
            raise ValueError(f"{packed[0]}: sequences packed into one row given, a row each expected")


class InfiniLlamaAttention(InfiniModule, LlamaAttention):
    """LlamaAttention with Infini-attention."""


class InfiniMistralAttention(InfiniModule, MistralAttention):
    """MistralAttention with Infini-attention."""


class InfiniQwen2Attention(InfiniModule, Qwen2Attention):
    """Qwen2Attention with Infini-attention."""


class InfiniQwen3Attention(InfiniModule, Qwen3Attention):
    """Qwen3Attention with Infini-attention."""


CLASSES = {
    LlamaAttention: InfiniLlamaAttention,
    MistralAttention: InfiniMistralAttention,
    Qwen2Attention: InfiniQwen2Attention,
    Qwen3Attention: InfiniQwen3Attention,
}


def not_converted(module, *_args, **_options):
    given = type(module).__name__
    raise ValueError(f"attention: {NAME} given for a {given}, infini_attn.hf.convert expected before")


AttentionInterface.register(NAME, not_converted)
AttentionMaskInterface.register(NAME, flash_attention_mask)


class InfiniCacheLayer(CacheLayerMixin):
    """What one layer has seen: a state of the operator, of one size however many tokens there were."""

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state = None
        self.record_past = False
        self.reset()

    def advance(self, call: dict) -> torch.Tensor:
        """Calls the operator with these arguments for the tokens that follow; returns its output."""
        tokens, mask = call["k"].shape[1], call["attention_mask"]
        undo = None
        if self.record_past and self.fills_a_segment(tokens, call["segment_len"]):
            undo = (None if self.state is None else self.state.fork(), call)
        out, self.state = infini_attention(**call, state=self.state, inplace=in_place(self.state))
        self.is_initialized, self.undo = True, undo
        self.seen += tokens
        full = tokens if mask is None else int(mask.flip(1).long().cumprod(1).sum(1).min())
        self.unpadded = self.unpadded + full if full == tokens else full
        return out

    def fills_a_segment(self, tokens: int, segment_len: int) -> bool:
        longest = 0 if self.state is None else int(max(self.state.open_len))
        return longest + tokens >= segment_len

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens of every stream: -n for n of them.

        That reaches to where the open segments begin, and once `activate_past_recording` was called also
        to where the last call did.

        Raises
        ------
        ValueError
            For what cannot be taken back. Nothing has changed then.
        """
        n, undo = -tokens_to_remove, self.undo
        most = min(self.unpadded, 0 if self.state is None else int(min(self.state.open_len)))
        if 0 <= n <= most:
            for slot in range(len(self.state) if n else 0):
                self.state.truncate(slot, int(self.state.tokens[slot]) - n)
        elif undo is not None and 0 <= n <= min(self.unpadded, undo[1]["k"].shape[1]):
            before, call = undo
            # The segment's end goes with the call; its tokens that stay come again.
            call = first(call, call["k"].shape[1] - n)
            _, self.state = infini_attention(**call, state=before, inplace=in_place(before))
        else:
            raise ValueError(
                f"tokens_to_remove: {tokens_to_remove} given, {-most} to 0 expected: what is in the "
                "memory cannot be taken back (for drafts: cache=InfiniCache(model.config))"
            )
        self.undo = None
        self.seen -= n
        self.unpadded -= n

    @property
    def is_croppable(self) -> bool:
        """Whether the tokens of the last call can be taken back, wherever segments end."""
        return self.record_past

    def activate_past_recording(self) -> None:
        """From now on the last call's tokens can be taken back."""
        self.record_past = True

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are of the call's tokens alone."""
        return query_length, 0

    def get_max_length(self) -> int:
        """There is none: -1."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self.state = self.undo = None
        self.is_initialized = False
        self.seen = self.unpadded = 0

    def detach(self) -> None:
        """Gradients of what follows end here."""
        self.undo = None
        if isinstance(self.state, State):
            self.state = self.state.detach()

    def fork(self, streams: list[int]) -> None:
        """Stream i goes on where streams[i] stands."""
        self.undo = None
        if self.state is not None:
            self.state = self.state.fork(streams)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Stream i goes on where beam_idx[i] stands."""
        self.fork(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every stream goes on as so many."""
        if self.state is not None:
            self.fork([i for i in range(len(self.state)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these streams: indices, or ones in a mask."""
        if self.state is not None:
            self.fork(torch.arange(len(self.state))[indices.cpu()].tolist())

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The first call makes the state."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """There are no keys and values to give back."""
        raise ValueError("cache: an InfiniCacheLayer given, another expected of a model not converted")


def in_place(state) -> bool:
    """Whether a call advances a state itself: what gradients are computed of stays as it is."""
    return state is not None and not torch.is_grad_enabled()


def first(call: dict, tokens: int) -> dict:
    """The same call for its first tokens alone."""
    cut = {name: call[name][:, :tokens] for name in ("q", "k", "v")}
    mask = call["attention_mask"]
    cut["attention_mask"] = None if mask is None else mask[:, :tokens]
    return call | cut | {"positions": call["positions"][..., :tokens]}


class InfiniCache(Cache):
    """A cache of `InfiniCacheLayer`s for a converted model's configuration.

    `generate` does without: it makes a DynamicCache, whose fresh layers the model replaces. Assistants
    and prompt lookup take tokens back, and need this one.
    """

    def __init__(self, config) -> None:
        layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[InfiniCacheLayer() for _ in range(layers)])

    def detach(self) -> None:
        """What was seen so far is a constant to the gradients of what follows."""
        for layer in self.layers:
            layer.detach()


def cache_layer(cache: Cache, index: int) -> InfiniCacheLayer:
    """Layer `index` of a cache. Fresh layers of a DynamicCache make way."""
    layers = getattr(cache, "layers", None)
    if layers is None or cache.offloading:
        given = type(cache).__name__ if layers is None else "one that is offloaded"
        raise ValueError(f"cache: {given} given, an InfiniCache or a fresh DynamicCache expected")
    layers += [DynamicLayer() for _ in range(index + 1 - len(layers))]
    layer = layers[index]
    if type(layer) is DynamicLayer and not layer.is_initialized:
        layers[index] = layer = InfiniCacheLayer()
    if not isinstance(layer, InfiniCacheLayer):
        given = f"layer {index}, a {type(layer).__name__} of {int(layer.get_seq_length())} tokens,"
        raise ValueError(f"cache: {given} given, an InfiniCache or a fresh DynamicCache expected")
    return layer
