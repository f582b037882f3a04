"""Infini-attention as a module of PyTorch: projections, gate and rotation around the operator."""

import torch

from . import Problem, infini_attention

__all__ = ["InfiniAttention"]


class Gated(torch.nn.Module):
    """A module with gate logits `beta`, float32 [Hq]. They stay float32 when `half()`, `bfloat16()` or
    `to(dtype)` convert the other parameters: they are few, and small steps of them matter."""

    beta: torch.nn.Parameter

    def add_gate(self, heads: int, logit: float, device=None) -> None:
        gate = torch.full((heads,), logit, dtype=torch.float32, device=device)
        self.beta = torch.nn.Parameter(gate)
        # For optimizers that ask: decay would draw gates towards half open.
        self.beta._no_weight_decay = True

    def _apply(self, fn, recurse=True):
        gate = (self.beta, self.beta.grad)

        def keep_type(tensor):
            done = fn(tensor)
            if any(tensor is t for t in gate) and done.dtype != tensor.dtype:
                return tensor.to(done.device)
            return done

        return super()._apply(keep_type, recurse)


def rotation(cos: torch.Tensor, sin: torch.Tensor) -> dict:
    """The operator's arguments that rotate token [b, t] by row [b, t] of both, [B or 1, T, R/2]."""
    batch, tokens = cos.shape[:2]
    rows = torch.arange(batch * tokens).view(batch, tokens)
    tables = tuple(x.flatten(0, 1).float().contiguous() for x in (cos, sin))
    return {"rope": tables, "positions": rows[0] if batch == 1 else rows}


def rotation_of_embeddings(embeddings: tuple, batch: int, tokens: int) -> dict:
    """The same of (cos, sin) as Hugging Face's models make them, [B or 1, T, R]: frequencies twice."""
    cos, sin = embeddings
    expected = [(1, tokens), (batch, tokens)]
    if cos.shape != sin.shape or cos.dim() != 3 or tuple(cos.shape[:2]) not in expected:
        raise ValueError(
            f"position_embeddings: shapes {list(cos.shape)} and {list(sin.shape)} given, "
            f"twice [1, {tokens}, R] or [{batch}, {tokens}, R] expected"
        )
    half = cos.shape[-1] // 2
    return rotation(cos[..., :half], sin[..., :half])


def last_columns(mask: torch.Tensor | None, batch: int, tokens: int) -> torch.Tensor | None:
    """Of a mask [B, tokens seen], such as `generate` grows, the columns of this call."""
    if mask is None:
        return None
    mask = torch.as_tensor(mask)
    if mask.dim() != 2 or mask.shape[0] != batch:
        given = list(mask.shape)
        raise ValueError(f"attention_mask: shape {given} given, [B, T] = [{batch}, {tokens}] expected")
    return mask[:, mask.shape[1] - tokens :] if mask.shape[1] > tokens else mask


class InfiniAttention(Gated):
    """Multi-head Infini-attention with its projections.

    Parameters
    ----------
    embed_dim : int
        Width E of what comes in and goes out.
    heads, kv_heads : int
        Query heads Hq, and key/value heads Hkv (Hq by default), each with a memory.
    head_dim : int
        Width D of a head, embed_dim // heads by default.
    segment_len, update, empty_memory
        As in infini_attention.
    rope_theta : float or None
        Base of the rotation's frequencies; None rotates nothing.
    bias : bool
        Whether the projections have one.
    gate : float
        What the gate logits `beta`, a float32 parameter [Hq], begin with: 0 mixes memory and segment
        half and half, -inf is the segment alone. They stay float32 when `half()`, `bfloat16()` or
        `to(dtype)` convert the rest, and are marked `_no_weight_decay`.
    device, dtype
        Of the projections.
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        segment_len: int = 2048,
        update: str = "delta",
        empty_memory: str = "gate",
        rope_theta: float | None = 10000.0,
        bias: bool = False,
        gate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if head_dim is None and (heads < 1 or embed_dim % heads):
            raise ValueError(f"heads: {heads} given, a divisor of embed_dim = {embed_dim} expected")
        self.embed_dim, self.heads = embed_dim, heads
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.head_dim = embed_dim // heads if head_dim is None else head_dim
        self.rope_theta = rope_theta
        self.policies = {"segment_len": segment_len, "update": update, "empty_memory": empty_memory}
        extents = {"heads": heads, "kv_heads": self.kv_heads, "key_dim": self.head_dim}
        Problem(**extents, **self.policies)  # Which says what is wrong with them.
        width, options = self.head_dim, {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = torch.nn.Linear(embed_dim, heads * width, **options)
        self.k_proj = torch.nn.Linear(embed_dim, self.kv_heads * width, **options)
        self.v_proj = torch.nn.Linear(embed_dim, self.kv_heads * width, **options)
        self.o_proj = torch.nn.Linear(heads * width, embed_dim, **options)
        self.add_gate(heads, gate, device)

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        state=None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        return_state: bool = True,
        bptt_segments: int | None = None,
    ):
        """Attends to `hidden`, [B, T, E], and to what `state` has seen.

        Parameters
        ----------
        attention_mask : [B, T] or longer, optional
            Ones for tokens and zeros for padding, on either side; of a longer one the last T columns.
        state : optional
            Where the streams stand. Without gradients (under `torch.no_grad()`, the module in `eval()`)
            it is advanced itself, and `state.fork()` before keeps a copy; otherwise it stays as it is, and
            the next call takes the state returned. New, empty streams by default.
        position_embeddings : (cos, sin), each [B or 1, T, R], optional
            Rotates by these, every frequency twice as Hugging Face's models make them, instead of by
            each token's place in its stream.
        return_state : bool
            Whether to return the state.
        bptt_segments : int, optional
            As in infini_attention.

        Returns
        -------
        (out, state)
            out is [B, T, E]; state is None without return_state.
        """
        if hidden.dim() != 3 or hidden.shape[2] != self.embed_dim:
            given = list(hidden.shape)
            raise ValueError(f"hidden: shape {given} given, [B, T, {self.embed_dim}] expected")
        batch, tokens = hidden.shape[:2]
        mask = last_columns(attention_mask, batch, tokens)
        options = dict(self.policies)
        if position_embeddings is not None:
            options |= rotation_of_embeddings(position_embeddings, batch, tokens)
        elif self.rope_theta is not None:
            options |= rotation(*self.tables(places(state, mask, batch, tokens, hidden.device)))
        split = lambda x: x.unflatten(-1, (-1, self.head_dim))
        q, k, v = (split(project(hidden)) for project in (self.q_proj, self.k_proj, self.v_proj))
        # What is computed again for its gradients finds the state as it was.
        inplace = state is not None and not (self.training or torch.is_grad_enabled())
        results = infini_attention(
            q, k, v, self.beta, state=state, inplace=inplace, attention_mask=mask,
            return_state=return_state, bptt_segments=bptt_segments, **options,
        )
        out, state = results if return_state else (results, None)
        return self.o_proj(out.flatten(-2)), state

    def tables(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [..., D/2] of places in the stream: as many rows as there are places, so
        that no table grows with it. In float64, for places of millions of tokens."""
        half = torch.arange(self.head_dim // 2, dtype=torch.float64, device=places.device)
        angles = places[..., None] * self.rope_theta ** (-2 * half / self.head_dim)
        return angles.cos(), angles.sin()

    def extra_repr(self) -> str:
        own = {name: getattr(self, name) for name in ("heads", "kv_heads", "head_dim", "rope_theta")}
        return ", ".join(f"{name}={value!r}" for name, value in (own | self.policies).items())


def places(state, mask: torch.Tensor | None, batch: int, tokens: int, device) -> torch.Tensor:
    """The place of each token in its stream, int64 [B, T], or [1, T] where all streams agree."""
    seen = torch.as_tensor(getattr(state, "tokens", [0]))
    # What is no state, or one of another batch, the operator refuses.
    same = lambda: not torch.compiler.is_compiling() and seen.unique().numel() < 2
    if len(seen) != batch or same():
        seen = seen[:1]
    if mask is None:
        steps = torch.arange(tokens, device=device)
    else:
        # Padding gets the place of a neighbour, which nothing reads.
        steps = (mask.to(device, torch.int64).cumsum(1) - 1).clamp(min=0)
    return seen.to(device)[:, None] + steps
