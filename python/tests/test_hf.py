"""infini_attn.hf: models of transformers, with random weights, against themselves and float64."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from oracle import assert_close

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

import infini_attn.torch
from infini_attn import hf, reference

# The argument's name since transformers 5.2x, and before.
ARGUMENTS = inspect.signature(LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in ARGUMENTS else "past_key_values"
N = 8
TYPES = ["llama", "mistral", "qwen2", "qwen3"]
TINY = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.3,
    pad_token_id=0, bos_token_id=1, eos_token_id=None,
)


@pytest.fixture(autouse=True)
def without_gradients():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # There is nothing to share in models of this size.
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["own", "in a tensor"])
def states(request, monkeypatch):
    """Either kind of state; on devices they are tensors."""
    if request.param != "own":
        monkeypatch.setattr(hf, "infini_attention", infini_attn.torch.infini_attention)


def stock(kind="llama", **options):
    options = TINY | ({"sliding_window": None} if kind == "mistral" else {}) | options
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()


def converted(kind="llama", segment_len=N, **options):
    model = hf.convert(stock(kind), segment_len, **options)
    for name, gate in model.named_parameters():
        if name.endswith(".beta"):
            gate.uniform_(-1, 1)
    return model


def tokens(batch, t, seed=0):
    return torch.randint(2, 64, (batch, t), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", TYPES)
def test_closed_gates_are_the_model_s_attention_within_segments(kind):
    ids = tokens(2, 3 * N + 5)
    place = torch.arange(ids.shape[1])
    within = (place[:, None] // N == place // N) & (place[:, None] >= place)
    expected = stock(kind)(ids, attention_mask=within[None, None].expand(2, 1, -1, -1)).logits
    model = hf.convert(stock(kind), N, gate=-torch.inf)
    assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("kind", TYPES)
def test_within_the_first_segment_a_converted_model_is_what_it_was(kind):
    ids = tokens(2, N)
    assert_close(hf.convert(stock(kind), N)(ids).logits, stock(kind)(ids).logits)


@pytest.mark.parametrize("update", ["delta", "linear"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_models_against_float64(kind, update, monkeypatch):
    ids = tokens(2, 4 * N + 3)
    model = converted(kind, update=update, empty_memory="gate")
    logits = model(ids).logits
    as_numpy = lambda x: x.numpy() if torch.is_tensor(x) else x

    def in_float64(**call):
        assert (call["update"], call["segment_len"], call["empty_memory"]) == (update, N, "gate")
        out = reference.infini_attention(**{name: as_numpy(x) for name, x in call.items()})
        return torch.as_tensor(out)

    monkeypatch.setattr(hf, "infini_attention", in_float64)
    assert_close(logits, model.double()(ids, use_cache=False).logits)


@pytest.mark.parametrize("make", [None, DynamicCache, hf.InfiniCache])
@pytest.mark.parametrize("pieces", [[10, 1, 13, 17, 1], [1] * 42], ids=["chunks", "tokens"])
def test_pieces_are_the_whole(states, pieces, make):
    model, ids = converted(), tokens(2, 42)
    cache, logits = make and make(config=model.config), []
    for piece in ids.split(pieces, dim=1):
        out = model(piece, **{CACHE: cache}, use_cache=True)
        cache = out[CACHE]
        logits.append(out.logits)
    assert_close(torch.cat(logits, 1), model(ids).logits)
    assert cache.get_seq_length() == 42 and cache.layers[1].is_initialized
    assert type(cache.layers[1]) is hf.InfiniCacheLayer


GENERATE = dict(max_new_tokens=2 * N + 3, do_sample=False)


@pytest.mark.parametrize("options", [
    {}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 3},
    {"do_sample": True, "num_return_sequences": 3}, {"prefill_chunk_size": 6},
], ids=str)
def test_generation_is_that_without_a_cache(states, options):
    model, ids = converted(), tokens(2, 3 * N + 5)
    options = GENERATE | options
    torch.manual_seed(0)
    got = model.generate(ids, **options)
    torch.manual_seed(0)
    options.pop("prefill_chunk_size", None)
    assert torch.equal(got, model.generate(ids, **options, use_cache=False))
    assert len(got.unique()) > 5  # not one token again and again


def padded(rows, width):
    """Rows of several lengths in one batch, padded on the left, and its mask."""
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for row, (to, ones) in zip(rows, zip(ids, mask)):
        to[width - row.shape[1] :] = row[0]
        ones[width - row.shape[1] :] = 1
    return ids, mask.long()


@pytest.mark.parametrize("chunk", [None, 7])
def test_padding_on_the_left_changes_nothing(states, chunk):
    model, rows = converted(), [tokens(1, t, seed=t) for t in (3, 2 * N, 3 * N + 5)]
    ids, mask = padded(rows, 3 * N + 7)
    options = GENERATE | {"output_logits": True, "return_dict_in_generate": True}
    batch = model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **options)
    for b, row in enumerate(rows):
        alone = model.generate(row, **options)
        assert torch.equal(batch.sequences[b, ids.shape[1] :], alone.sequences[0, row.shape[1] :])
        for got, right in zip(batch.logits, alone.logits):
            assert_close(got[b], right[0])


def test_padding_in_one_forward():
    model, rows = converted(), [tokens(1, t, seed=t) for t in (5, 2 * N)]
    ids, mask = padded(rows, 2 * N + 2)
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    for b, row in enumerate(rows):
        # Rotation knows differences of places only.
        assert_close(logits[b, -row.shape[1] :], model(row).logits[0], 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_models_come_back(tmp_path, dtype):
    model, ids = converted(gate=-torch.inf).to(dtype), tokens(1, 3 * N)
    gates = [p for name, p in model.named_parameters() if name.endswith("self_attn.beta")]
    assert len(gates) == 2 and {p.dtype for p in gates} == {torch.float32}
    model.save_pretrained(tmp_path)
    again = hf.load(tmp_path, dtype=dtype)
    assert again.dtype == dtype and again.config.infini_attention["segment_len"] == N
    for got, right in zip(again.parameters(), model.parameters(), strict=True):
        assert got.dtype == right.dtype and torch.equal(got, right)
    if dtype == torch.float32:  # A model's own to(dtype) rounds the frequencies of its rotation.
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert all(m.beta._no_weight_decay for m in again.modules() if isinstance(m, hf.InfiniModule))
    # What is made later is as ever.
    assert type(stock().model.layers[0].self_attn).__name__ == "LlamaAttention"


def test_checkpoints_that_are_refused(tmp_path):
    stock().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^path: a checkpoint without gates given"):
        hf.load(tmp_path)
    with pytest.raises(ValueError, match="^config: one without infini_attention given"):
        hf.InfiniLlamaAttention(stock().config, 0)
    assert torch.get_default_dtype() == torch.float32
    stock("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="^path: a checkpoint without gates given"):
        hf.load(tmp_path / "other")
    model = stock()
    model.config.infini_attention = hf.convert(stock()).config.infini_attention
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^path: a checkpoint without .*layers.0.self_attn.beta"):
        hf.load(tmp_path)


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("t, n", [(3 * N + 5, 5), (3 * N + 5, 6), (2 * N + 3, 16), (N - 1, 3)])
def test_crop(states, t, n, recording):
    """Cuts the last n of t tokens off, of which the last 2 N came in one call."""
    model, ids, drafts, rest = converted(), tokens(2, t - n), tokens(2, n, 1), tokens(2, N, 2)
    cache = hf.InfiniCache(model.config)
    if recording:
        cache.activate_past_recording()
    assert cache.is_croppable == recording
    for piece in torch.cat([ids, drafts], 1).tensor_split([max(t - 2 * N, 1)], dim=1):
        model(piece, **{CACHE: cache})
    for wrong in (1, -t - 1):
        with pytest.raises(ValueError, match="^tokens_to_remove: "):
            cache.crop(wrong)
    if recording or n <= t % N:
        cache.crop(-n)
        assert cache.get_seq_length() == t - n
        ids = torch.cat([ids, rest], 1)
    else:
        with pytest.raises(ValueError, match=rf"^tokens_to_remove: -{n} given, -{t % N} to 0 expected"):
            cache.crop(-n)
        assert cache.get_seq_length() == t
        ids = torch.cat([ids, drafts, rest], 1)
    assert_close(model(rest, **{CACHE: cache}).logits, model(ids).logits[:, -N:])


def test_crop_of_padding(states):
    """Behind padding on the right the last column is not everybody's last token."""
    model, cache = converted(), DynamicCache()
    model(tokens(2, 5), attention_mask=torch.tensor([[1] * 5, [1] * 4 + [0]]), **{CACHE: cache})
    model(tokens(2, 1), **{CACHE: cache})
    with pytest.raises(ValueError, match="^tokens_to_remove: -2 given, -1 to 0 expected"):
        cache.crop(-2)
    cache.crop(-1)
    assert [layer.state.tokens.tolist() for layer in cache.layers] == [[5, 4]] * 2


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_drafts_that_are_verified(states, how):
    model, ids = converted(), tokens(1, N).repeat(1, 3)[:, 3:]
    options = {"assistant_model": stock()} if how == "assistant" else {"prompt_lookup_num_tokens": 5}
    expected = model.generate(ids, **GENERATE)
    got = model.generate(ids, **GENERATE, **options, **{CACHE: hf.InfiniCache(model.config)})
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="cropped|cannot be taken back"):
        model.generate(ids, **GENERATE, **options)


def test_streams_of_a_cache(states):
    model, ids, rest = converted(), tokens(3, 2 * N + 3), tokens(3, N)
    cache = hf.InfiniCache(model.config)
    model(ids, **{CACHE: cache})
    expected = model(rest[[0, 0, 2]], **{CACHE: copy.deepcopy(cache)}).logits[[0, 2]]
    for choose in (
        lambda c: c.batch_select_indices(torch.tensor([0, 2])),
        lambda c: c.batch_select_indices(torch.tensor([True, False, True])),
        lambda c: c.reorder_cache(torch.tensor([0, 2])),
    ):
        choose(chosen := copy.deepcopy(cache))
        assert torch.equal(model(rest[[0, 2]], **{CACHE: chosen}).logits, expected)
    cache.batch_repeat_interleave(2)
    repeated = model(rest[[0, 0, 1, 1, 2, 2]], **{CACHE: cache}).logits
    assert_close(repeated[[1, 5]], expected)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(model(ids, **{CACHE: cache}).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_the_older_name_of_the_cache():
    model, ids = converted(), tokens(1, 2 * N + 3)
    cache = hf.InfiniCache(model.config)
    model(ids[:, :N], past_key_values=cache)
    out = model(ids[:, N:], past_key_values=cache)
    assert_close(out.logits, model(ids).logits[:, N:])
    module, half = model.model.layers[0].self_attn, torch.ones(1, N, 8)
    for name in ("cache", "past_key_values"):
        cache = hf.InfiniCache(model.config)
        module(torch.ones(1, N, 32), (half, half), **{name: cache})
        assert cache.get_seq_length() == N


def test_what_is_refused():
    for kind, options, text in [
        ("mistral", {"sliding_window": 4}, "^config.sliding_window: 4 given, None expected"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4}, "^config.sliding_window: 4"),
        ("gpt2", {}, "^model: GPT2LMHeadModel given, one with modules of LlamaAttention, "),
    ]:
        with pytest.raises(ValueError, match=text):
            hf.convert(stock(kind, **options))
    for options, text in [
        ({"segment_len": 0}, "^segment_len: 0 given"), ({"update": "none"}, "^update: 'none' given"),
        ({"empty_memory": "?"}, "^empty_memory: "),
        ({"gate": None}, "^gate: None given, a number expected"),
        ({"gate": torch.nan}, "^gate: nan given"),
    ]:
        model = stock()
        with pytest.raises(ValueError, match=text):
            hf.convert(model, **options)
        assert not hasattr(model.config, "infini_attention")
        assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"
    model = stock()
    model.model.layers[1].self_attn.forward = lambda *a, **o: None
    with pytest.raises(ValueError, match="^model: attention with a forward of its own"):
        hf.convert(model)
    model, ids = converted(), tokens(1, N)
    attend, half = model.model.layers[0].self_attn, torch.ones(1, 1, 8)
    offloaded = SimpleNamespace(layers=[], offloading=True)
    for cache, given in [((1, 2), "tuple"), (offloaded, "one that is offloaded")]:
        with pytest.raises(ValueError, match=f"^cache: {given}.* given, an InfiniCache or a fresh"):
            attend(torch.ones(1, 1, 32), (half, half), cache=cache)
    used = stock()(ids)[CACHE]
    for options, text in [
        ({"attention_mask": torch.ones(1, 1, N, N)}, r"^attention_mask: shape \[1, 1, 8, 8\] given"),
        ({"output_attentions": True}, "^output_attentions: True given"),
        ({"position_ids": torch.arange(N)[None] % 5, "use_cache": False}, "^position_ids: sequences"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 8])}, "^cu_seq_lens_q: sequences packed"),
        ({CACHE: used}, "^cache: layer 0, a DynamicLayer of 8 tokens, given, an InfiniCache or a fresh"),
    ]:
        with pytest.raises(ValueError, match=text):
            model(ids, **options)
    with pytest.raises(ValueError, match="^cache: layer 0, a StaticLayer of 0 tokens, given"):
        model.generate(ids, cache_implementation="static", **GENERATE)
    with pytest.raises(ValueError, match="^cache: an InfiniCacheLayer given"):
        stock()(ids, **{CACHE: hf.InfiniCache(model.config)})
    other = type(model)(copy.deepcopy(model.config))
    with pytest.raises(ValueError, match="^attention: infini_attention given for a LlamaAttention"):
        other(ids)
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="^attention_dropout: 0.1 given, 0 expected in training"):
        model.train()(ids)


def test_classes_in_the_place_of_others_are_classes():
    from transformers.models.llama import modeling_llama

    with hf.patched():
        class Own(modeling_llama.LlamaAttention):
            pass

        plain, own = stock(), Own(stock().config, 0)
        assert not isinstance(plain.model.layers[0].self_attn, Own) and type(own) is Own
        assert isinstance(own, modeling_llama.LlamaAttention)
    assert type(plain.model.layers[0].self_attn) is modeling_llama.LlamaAttention


def test_loading_leaves_models_of_other_threads_alone(tmp_path):
    import threading

    converted().save_pretrained(tmp_path)
    failures, done = [], threading.Event()

    def loads():
        try:
            for _ in range(3):
                loaded = hf.load(tmp_path)
                assert isinstance(loaded.model.layers[0].self_attn, hf.InfiniModule)
        except BaseException as error:
            failures.append(error)

    def ordinary():
        try:
            while not done.is_set():
                assert not isinstance(stock().model.layers[0].self_attn, hf.InfiniModule)
        except BaseException as error:
            failures.append(error)

    others, watcher = [threading.Thread(target=loads) for _ in range(2)], threading.Thread(target=ordinary)
    watcher.start()
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    done.set()
    watcher.join()
    assert not failures
    assert not isinstance(stock().model.layers[0].self_attn, hf.InfiniModule)
