"""Right calls at random, of everything public: what the fuzzer starts from."""

import pathlib

import numpy as np
import torch
from fuzz_values import numbers, spoiled_bytes

import infini_attn
from infini_attn import KeySums, Problem, SegmentMap, State, _core, reference

FOLDER = pathlib.Path("fuzz")


class World:
    """A problem and what belongs to it, made from one call's random numbers alone."""

    def __init__(self, rng):
        self.rng = rng
        pick = rng.randint
        self.torch = rng.random() < 0.5
        self.dtype = rng.choice(("f32", "f32", "f16", "bf16") if self.torch else ("f32", "f32", "f16"))
        self.kv_heads, self.key_dim, self.value_dim = pick(1, 3), pick(1, 8), pick(1, 8)
        self.heads = self.kv_heads * pick(1, 2)
        self.batch = pick(1, 3)
        self.policies = dict(segment_len=pick(1, 8))
        for name, values in dict(
            update=("delta", "linear"), scale=(1.0, 0.25), empty_memory=("gate", "bypass"),
            denominator=("exact", ("clamp", 0.5), ("add", 0.25)),
        ).items():
            if rng.random() < 0.4:
                self.policies[name] = rng.choice(values)
        self.rope = self.key_dim > 1 and rng.random() < 0.3
        # What the operator has been called with, for the reference to repeat.
        self.history = []
        self.streams = None

    def chance(self, p):
        return self.rng.random() < p

    def some(self, p, **options):
        """Each of the options with probability p."""
        return {name: value for name, value in options.items() if self.chance(p)}

    def numbers(self, *shape, dtype=None):
        return numbers(self.rng, shape, dtype or self.dtype, self.torch)

    def integers(self, low, high, *shape):
        """Integers from low to high, as a list, an array or a tensor."""
        values = np.array([self.rng.randint(low, high) for _ in range(int(np.prod(shape)))], np.int64).reshape(shape)
        forms = (np.ndarray.tolist, np.asarray, lambda a: a.astype(np.int32), torch.from_numpy)
        return self.rng.choice(forms)(values)

    def tokens(self, most=20):
        return self.rng.choice((0, 1, 1, self.rng.randint(2, most)))

    def problem(self, **changes):
        options = dict(kv_heads=self.kv_heads, value_dim=self.value_dim, dtype=self.dtype, **self.policies)
        return Problem(heads=self.heads, key_dim=self.key_dim, **{**options, **changes})

    def k(self, t):
        return self.numbers(self.batch, t, self.kv_heads, self.key_dim)

    def v(self, t):
        return self.numbers(self.batch, t, self.kv_heads, self.value_dim)

    def inputs(self, t):
        """q, k, v, beta and the options that say which tokens there are."""
        beta = self.numbers(self.heads, dtype=self.rng.choice(("f32", "f16")))
        forms = (lambda b: b, lambda b: b, lambda b: b.tolist(), lambda b: b[None, :, None], lambda b: float(b[0]))
        beta = self.rng.choice(forms)(beta)
        options, lead = self.layout(t)
        if self.rope:
            rotated = self.rng.randint(1, self.key_dim // 2)
            pair = self.rng.choice((tuple, list))
            options["rope"] = pair(self.numbers(64, rotated, dtype="f32") for _ in "cs")
            shape = self.rng.choice((lead[-1:], lead))
            options |= self.some(0.3, positions=self.integers(0, 63, *shape), rope_interleaved=self.chance(0.5))
        q = self.numbers(*lead, self.heads, self.key_dim)
        k = self.numbers(*lead, self.kv_heads, self.key_dim)
        return (q, k, self.numbers(*lead, self.kv_heads, self.value_dim), beta), options

    def layout(self, t):
        """Options that lay out the sequences of a batch, and the leading extents of its tensors."""
        slots = self.some(0.2, slots=self.rng.sample(range(self.batch), self.batch))
        kind = self.rng.choice((None,) * 4 + ("seq_lens", "attention_mask", "cu_seqlens"))
        if kind == "seq_lens":
            return slots | dict(seq_lens=self.integers(0, t, self.batch)), (self.batch, t)
        if kind == "cu_seqlens":
            lens = [self.rng.randint(0, t) for _ in range(self.batch)]
            cu = np.cumsum([0, *lens])
            form = self.rng.choice((np.ndarray.tolist, np.asarray, lambda a: a.astype(np.int32), torch.from_numpy))
            return slots | dict(cu_seqlens=form(cu)), (sum(lens),)
        if kind == "attention_mask":
            mask = np.zeros((self.batch, t), self.rng.choice((np.bool_, np.int64, np.float32, np.uint8)))
            for row in mask:
                first = self.rng.randint(0, t)
                row[first : self.rng.randint(first, t)] = 1
            return slots | dict(attention_mask=self.rng.choice((np.asarray, np.ndarray.tolist, torch.from_numpy))(mask)), mask.shape
        return slots, (self.batch, t)

    def state(self):
        """The world's streams, which have seen up to two calls."""
        if self.streams is None:
            self.streams = State(self.problem(), self.batch)
            for _ in range(self.rng.choice((0, 1, 1, 2))):
                args, options = self.inputs(self.rng.randint(1, 12))
                infini_attn.infini_attention(*args, state=self.streams, inplace=True, **options)
                self.history.append((args, options))
        return self.streams

    def closed(self):
        """A state without an open segment."""
        state = self.state().fork()
        state.flush()
        return state

    def sums(self, t):
        return infini_attn.key_sums(self.problem(), self.k(t))

    def map(self, before):
        t = self.rng.randint(1, 12)
        return infini_attn.segment_map(self.problem(), self.k(t), self.v(t), before)


def returns(w):
    return w.some(0.3, return_state=w.chance(0.5), return_lse=True, return_parts=True)


def operator(w):
    args, options = w.inputs(w.tokens())
    if w.chance(0.6):
        options["state"] = w.state()
        options |= w.some(0.5, **w.policies) | w.some(0.5, inplace=True)
    else:
        options |= w.policies
    if w.chance(0.2):
        options["out"] = w.numbers(*args[0].shape[:-1], w.value_dim)
    return args, options | returns(w)


def of_reference(w):
    args, options = w.inputs(w.rng.randint(0, 6))
    _, state = reference.infini_attention(*args, **options, **w.policies)
    return args, options | returns(w) | w.some(0.5, state=state) | w.policies


def reference_state(w):
    args, options = w.inputs(3)
    return reference.infini_attention(*args, **options)[1]


def flush_of_reference(w):
    return (of_reference(w)[1].get("state") or reference_state(w),), {}


def make_problem(w):
    return (), dict(heads=w.heads, key_dim=w.key_dim, **w.policies) | w.some(
        0.5, kv_heads=w.kv_heads, value_dim=w.value_dim, dtype=w.dtype)


def from_arrays(w):
    memory = w.numbers(w.batch, w.kv_heads, w.key_dim, w.value_dim, dtype="f32")
    z = w.numbers(w.batch, w.kv_heads, w.key_dim, dtype="f32")
    tokens = w.integers(8, 20, w.batch)
    return (memory, z, tokens), w.some(0.5, committed=w.integers(0, 8, w.batch), heads=w.heads, dtype=w.dtype) | w.policies


def slots(w):
    """Different slots of a state."""
    chosen = w.rng.sample(range(w.batch), w.rng.randint(0, w.batch))
    return (w.state(),), w.some(0.5, slots=w.rng.choice((list, np.array, torch.tensor))(chosen))


def truncate(w):
    """A stream and how many tokens of it stay: a few less, mostly."""
    state, slot = w.state(), w.rng.randint(0, w.batch - 1)
    return state, slot, max(0, int(state.tokens[slot]) - w.rng.choice((0, 1, 2, 9)))


def fork(w):
    return (w.state(),), w.some(0.6, slots=w.integers(0, w.batch - 1, w.rng.randint(1, 4)))


def item(w):
    at = lambda: w.rng.randint(-w.batch, w.batch - 1)
    return (w.state(), w.rng.choice((at(), slice(at(), at()), slice(None, None, -1), w.integers(0, w.batch - 1, 2)))), {}


def save(w):
    path = w.rng.choice((FOLDER / "state", "fuzz/new", b"fuzz/bytes", str(FOLDER), "fuzz/none/x", "", "\0", "y" * 300, "/dev/null", "/dev/full"))
    return (w.state(), path), {}


def load(w):
    """A file with a state in it, or not."""
    data = w.state().__reduce__()[1][0]
    if w.chance(0.3):
        data = bytes(spoiled_bytes(w.rng, data))
    (FOLDER / "state").write_bytes(data)
    path = w.rng.choice((*[FOLDER / "state", "fuzz/state", b"fuzz/state"] * 3, str(FOLDER), "fuzz/none", "fuzz/\0", "/dev/null"))
    return (path,), w.some(0.5, problem=w.problem())


def merge_partials(w):
    t, count = w.tokens(), w.rng.randint(1, 3)
    a_dot = [w.numbers(w.batch, t, w.heads, w.value_dim) for _ in range(count)]
    lse = [w.numbers(w.batch, w.heads, t, dtype="f32") for _ in range(count)]
    return (a_dot, lse), w.some(0.5, return_lse=True)


def merge_memories(w):
    if w.chance(0.8):
        w.policies["update"] = "linear"
    return ([w.closed() for _ in range(w.rng.randint(0, 2))] + [w.state()],), {}


def key_sums(w):
    """Sums from their parts, positive as sums over some tokens are."""
    sums = w.numbers(w.batch, w.kv_heads, w.key_dim, dtype="f32")
    return (w.problem(),), dict(sums=abs(sums), tokens=w.integers(1, 20, w.batch))


def map_parts(w):
    heads = (w.batch, w.kv_heads, w.key_dim)
    parts = dict(A=w.numbers(*heads, w.key_dim, dtype="f32"), B=w.numbers(*heads, w.value_dim, dtype="f32"))
    return (w.sums(w.tokens()),), parts | dict(dz=abs(w.numbers(*heads, dtype="f32")), tokens=w.integers(1, 20, w.batch))


def unpickle(make):
    """What a pickle calls its function with."""
    return lambda w: (make(w).__reduce__()[1], {})


def add(w):
    return (w.sums(w.tokens()), w.sums(w.tokens())), {}


def segment_map(w):
    t = w.tokens()
    return (w.problem(), w.k(t), w.v(t), w.sums(w.tokens())), {}


def compose(w):
    t = w.rng.randint(1, 9)
    k, before = w.k(t), w.sums(w.tokens())
    first = infini_attn.segment_map(w.problem(), k, w.v(t), before)
    return (first, w.map(before + infini_attn.key_sums(w.problem(), k))), {}


def apply(w):
    state = w.closed()
    return (w.map(KeySums.from_state(state)), state), w.some(0.5, inplace=True)


def buffer(w):
    """The world's streams in a tensor, and what says how to read it."""
    state = w.state()
    text = _core._problem_text(state.problem)
    count, rotation = len(state), w.rope or w.chance(0.5)
    tensor = torch.zeros(_core._host_layout(text, count, rotation)[1], dtype=torch.uint8)
    _core._state_into_buffer(state, tensor, count, text, rotation)
    return tensor, count, text, rotation


def tokens_of(w):
    """q, k, v, beta and options as the operators of infini_attn.torch hand them on."""
    args, options = w.inputs(w.tokens())
    cos, sin = options.pop("rope", (None, None))
    names = dict(slots="seq_slots", rope_interleaved="interleaved")
    options = {names.get(name, name): value for name, value in options.items()}
    if cos is not None:
        options |= dict(cos=cos, sin=sin)
    return args, options


def advance(w):
    args, options = tokens_of(w)
    return (*args, *buffer(w)), options | w.some(0.3, short=True)


def outputs(w, q, dtype=None):
    """New numbers shaped like a call's output and its log-sum-exp."""
    o = lambda: w.numbers(*q.shape[:-1], w.value_dim, dtype=dtype)
    return o, lambda: w.numbers(*q.shape[:-3], w.heads, q.shape[-3], dtype=dtype or "f32")


def backward(w):
    args, options = tokens_of(w)
    state, *reading = buffer(w)
    o, lse = outputs(w, args[0])
    options |= w.some(0.3, d_lse=lse(), d_a_mem=o(), bptt_segments=w.rng.randint(1, 3))
    if w.chance(0.3):
        options |= dict(a_dot=o(), d_a_dot=o())
    d_state = state.clone() if w.chance(0.5) else None
    return (*args, state if w.chance(0.7) else None, d_state, *reading, o(), lse(), o()), options


def rows(w):
    """A state of float64, its slots and its problem; or no state."""
    text = _core._problem_text(w.problem(dtype="f32"))
    if w.chance(0.3):
        return None, w.batch, text
    made = torch.rand(w.batch, _core._row_len(text), dtype=torch.float64)
    opened = w.rng.randrange(w.problem().segment_len)
    made[:, -4:] = torch.tensor([9.0 + opened, 9.0, opened, float(w.rope and opened > 0)])
    return made, w.batch, text


def advance_float64(w):
    w.dtype = w.rng.choice(("f32", "f16"))
    args, options = tokens_of(w)
    return (*args, *rows(w)), options


def backward_float64(w):
    (*args, _, _, _), options = advance_float64(w)
    o, lse = outputs(w, args[0], "f32")
    given = [x if w.chance(0.5) else None for x in (o(), lse(), None, o(), o())]
    return (*args, *rows(w), *given), options | w.some(0.3, bptt_segments=w.rng.randint(1, 3))


def of_slots(w):
    """Different slots of a state in a tensor, or all."""
    return (*buffer(w), slots(w)[1].get("slots")), {}


def call_problem(w):
    extents = w.heads, w.kv_heads, w.key_dim, w.value_dim
    policies = ("segment_len", "update", "scale", "empty_memory", "denominator")
    base = _core._problem_text(w.problem()) if w.chance(0.5) else None
    return (base, extents, w.dtype, *(w.policies.get(name) for name in policies)), {}


def getters(owner, make):
    """The properties and the repr of a class, as functions of one argument."""
    names = sorted(name for name, value in vars(owner).items() if type(value).__name__ == "getset_descriptor")
    calls = {f"{owner.__name__}.{name}": (vars(owner)[name].__get__, make) for name in names}
    return calls | {f"{owner.__name__}.__repr__": (owner.__repr__, make)}


def of(make):
    return lambda w: ((make(w),), {})


# Name: what is called, and what makes right arguments of a World.
CALLS = {
    "infini_attention": (infini_attn.infini_attention, operator),
    "reference.infini_attention": (reference.infini_attention, of_reference),
    "ReferenceState.flush": (reference.State.flush, flush_of_reference),
    "Problem": (Problem, make_problem),
    "Problem.state_bytes": (Problem.state_bytes, lambda w: ((w.problem(),), w.some(0.5, sequences=w.batch, rotation=True))),
    "Problem.__eq__": (Problem.__eq__, lambda w: ((w.problem(), w.problem()), {})),
    "State": (State, lambda w: ((w.problem(),), w.some(0.5, sequences=w.batch))),
    "State.from_arrays": (State.from_arrays, from_arrays),
    "State.flush": (State.flush, slots),
    "State.reset": (State.reset, slots),
    "State.truncate": (State.truncate, lambda w: (truncate(w), {})),
    "State.fork": (State.fork, fork),
    "State.concat": (State.concat, lambda w: (([w.state() for _ in range(w.rng.randint(1, 3))],), {})),
    "State.__len__": (State.__len__, of(World.state)),
    "State.__getitem__": (State.__getitem__, item),
    "State.save": (State.save, save),
    "State.load": (State.load, load),
    "State.__copy__": (State.__copy__, of(World.state)),
    "State.__deepcopy__": (State.__deepcopy__, lambda w: ((w.state(), {}), {})),
    "State.__reduce__": (State.__reduce__, of(World.state)),
    "_state_from_bytes": (_core._state_from_bytes, lambda w: w.state().__reduce__()[1:] + ({},)),
    "_problem_from_fields": (_core._problem_from_fields, unpickle(World.problem)),
    "_key_sums_from_bytes": (_core._key_sums_from_bytes, unpickle(lambda w: w.sums(3))),
    "_segment_map_from_bytes": (_core._segment_map_from_bytes, unpickle(lambda w: w.map(w.sums(3)))),
    "_cuda_status": (_core._cuda_status, lambda w: ((), {})),
    "_host_layout": (_core._host_layout, lambda w: ((buffer(w)[2], w.batch, w.chance(0.5)), {})),
    "_problem_text": (_core._problem_text, of(World.problem)),
    "_problem_from_text": (_core._problem_from_text, of(lambda w: _core._problem_text(w.problem()))),
    "_call_problem": (_core._call_problem, call_problem),
    "_advance": (_core._advance, advance),
    "_backward": (_core._backward, backward),
    "_advance_float64": (_core._advance_float64, advance_float64),
    "_backward_float64": (_core._backward_float64, backward_float64),
    "_row_len": (_core._row_len, lambda w: ((buffer(w)[2],), {})),
    "_flush_slots": (_core._flush_slots, of_slots),
    "_reset_slots": (_core._reset_slots, of_slots),
    "_truncate_slot": (_core._truncate_slot, lambda w: ((*buffer(w), *truncate(w)[1:]), {})),
    "_state_from_buffer": (_core._state_from_buffer, lambda w: (buffer(w), {})),
    "_state_into_buffer": (_core._state_into_buffer, lambda w: ((w.state(), *buffer(w)), {})),
    "Problem.__hash__": (Problem.__hash__, of(World.problem)),
    "Problem.__reduce__": (Problem.__reduce__, of(World.problem)),
    "KeySums": (KeySums, key_sums),
    "KeySums.__eq__": (KeySums.__eq__, add),
    "KeySums.__reduce__": (KeySums.__reduce__, of(lambda w: w.sums(3))),
    "SegmentMap": (SegmentMap, map_parts),
    "SegmentMap.__reduce__": (SegmentMap.__reduce__, of(lambda w: w.map(w.sums(3)))),
    "KeySums.zero": (KeySums.zero, lambda w: ((w.problem(),), w.some(0.5, batch=w.batch))),
    "KeySums.from_state": (KeySums.from_state, of(World.closed)),
    "KeySums.__add__": (KeySums.__add__, add),
    "key_sums": (infini_attn.key_sums, lambda w: ((w.problem(), w.k(w.tokens())), {})),
    "segment_map": (infini_attn.segment_map, segment_map),
    "compose": (infini_attn.compose, compose),
    "apply": (infini_attn.apply, apply),
    "merge_partials": (infini_attn.merge_partials, merge_partials),
    "merge_memories": (infini_attn.merge_memories, merge_memories),
    "set_num_threads": (infini_attn.set_num_threads, lambda w: ((w.rng.randint(1, 2),), {})),
    "get_num_threads": (infini_attn.get_num_threads, lambda w: ((), {})),
    "simd_level": (_core.simd_level, lambda w: ((), {})),
    **getters(Problem, of(World.problem)),
    **getters(State, of(World.state)),
    **getters(KeySums, of(lambda w: w.sums(3))),
    **getters(SegmentMap, of(lambda w: w.map(w.sums(3)))),
    **getters(reference.State, of(reference_state)),
}

# How often each is called.
WEIGHTS = {name: 30 if name == "infini_attention" else 1 if hasattr(f, "__objclass__") else 3 for name, (f, _) in CALLS.items()}

# Which calls may change the state they are given.
BUFFERS = {"_advance", "_backward", "_flush_slots", "_reset_slots", "_truncate_slot", "_state_into_buffer"}
WRITES = {"State.flush", "State.reset", "State.truncate", "ReferenceState.flush"} | BUFFERS
