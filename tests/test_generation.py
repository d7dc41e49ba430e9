"""Generation in every form that transformers offers an encoder-decoder, and infilling."""

import pytest
import torch
from accelerate import cpu_offload
from transformers import DynamicCache, GenerationConfig, StaticCache, TextIteratorStreamer
from transformers.generation import GenerationMode

from qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.modeling_qwen3_decoder import SourceDynamicCache, SourceStaticCache
from tests.conftest import BACKENDS, tiny_config, use_backend

S = 9


def static_cache(model, length: int = S + 16) -> StaticCache:
    return StaticCache(model.config.get_text_config(decoder=True), max_cache_len=length)


def test_generation_ignores_padding(model, source):
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    together = model.generate(**source, **options)
    for row, kept in enumerate(source["attention_mask"].bool()):
        alone = model.generate(source["input_ids"][row, kept][None], **options)
        assert torch.equal(together[row], alone[0])
    # the control: without the mask the padding is read
    assert not torch.equal(model.generate(source["input_ids"], **options), together)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}])
def test_every_cache_gives_the_tokens_of_none(source, implementation, masked, options):
    torch.manual_seed(0)
    model = Qwen3ForSeq2SeqLM(tiny_config(num_decoder_layers=2)).eval()
    assert (len(model.get_encoder().layers), len(model.get_decoder().layers)) == (3, 2)
    use_backend(model, implementation)
    ids, mask = source["input_ids"], source["attention_mask"] if masked else None

    def generate(ids, **cache) -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=mask, max_new_tokens=8, **options, **cache)

    expected = generate(ids, use_cache=False)
    for kind in ("dynamic", "static"):
        assert torch.equal(generate(ids, cache_implementation=kind), expected)
    # the control: another source gives another text
    assert not torch.equal(generate(ids.flip(1)), expected)


@torch.no_grad()
def test_a_static_cache_without_a_source(model):
    ids = torch.randint(0, 300, (2, 4), generator=torch.Generator().manual_seed(1))
    inputs = {"encoder_outputs": (torch.zeros(2, 0, 40),), "decoder_input_ids": ids}
    found = model(**inputs, cache=static_cache(model)).logits
    torch.testing.assert_close(found, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_a_gpu_decodes_with_a_static_cache_where_steps_compile(model, implementation, monkeypatch):
    use_backend(model, implementation)
    monkeypatch.setattr(Qwen3ForSeq2SeqLM, "device", torch.device("cuda"))
    inputs = {"encoder_outputs": (torch.zeros(1, S, 40),)}
    settings = GenerationConfig(use_cache=True, num_beams=1, num_return_sequences=1)
    model._prepare_cache_for_generation(settings, inputs, GenerationMode.GREEDY_SEARCH, 1, 4)
    assert isinstance(inputs["cache"], StaticCache) == (implementation == "sdpa")


def test_a_step_is_compiled_as_one_graph(model, source):
    expected = model.generate(**source, max_new_tokens=6)
    inputs = {"encoder_outputs": model.get_encoder()(**source), "cache": static_cache(model)}
    inputs["attention_mask"] = source["attention_mask"]
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    token, tokens = expected[:, :1], []
    with torch.no_grad():
        for forward in (model, step, step, step):
            token = forward(decoder_input_ids=token, **inputs).logits[:, -1:].argmax(-1)
            tokens.append(token)
    assert torch.equal(torch.cat(tokens, 1), expected[:, 1:5])


@torch.no_grad()
def test_a_compiled_step_neither_projects_nor_copies_the_source(model, source):
    inputs = {"encoder_outputs": model.get_encoder()(**source)}
    token = torch.full((3, 1), 7)

    def concatenations(cache) -> list:
        """Along the keys, in the one graph of a step."""
        graphs = []

        def look(graph, _):
            graphs.append(graph)
            return graph

        step = torch.compile(model.forward, fullgraph=True, backend=look)
        step(decoder_input_ids=token, cache=cache, **inputs)
        (graph,) = graphs
        return [n for n in graph.graph.nodes if n.target is torch.cat and 2 in n.args]

    cache = static_cache(model)
    model(decoder_input_ids=token, cache=cache, **inputs)
    assert not concatenations(cache)
    assert concatenations(static_cache(model))  # the control: the first step does


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (kind, change)
        for kind in ("dynamic", "static", "ordinary")
        for change in ("reorder", "crop", "repeat", "reset")
        if (kind, change) != ("static", "repeat")  # its batch is fixed
    ],
)
def test_whatever_changes_a_cache_is_honoured(model, source, change, kind):
    tokens = torch.randint(0, 300, (3, 80), generator=torch.Generator().manual_seed(1))
    encoded = model.get_encoder()(**source)
    config = model.config.get_text_config(decoder=True)
    cache = {
        "dynamic": SourceDynamicCache(),
        "static": SourceStaticCache(config=config, max_cache_len=S + 16),
        "ordinary": DynamicCache(),
    }[kind]
    rows, length = torch.arange(3), 4

    def step(ids: torch.Tensor) -> torch.Tensor:
        return model(
            encoder_outputs=(encoded.last_hidden_state[rows],),
            attention_mask=source["attention_mask"][rows],
            decoder_input_ids=ids,
            cache=cache,
        ).logits

    for start in range(length):
        step(tokens[:, start : start + 1])
    if kind != "ordinary":
        assert cache.get_seq_length() == length
    if change == "reorder":
        rows = torch.tensor([2, 0, 0])
        cache.reorder_cache(rows)
    elif change == "crop":
        cache.crop(-2)
        length = 2
    elif change == "repeat":
        rows = rows.repeat_interleave(2)
        cache.batch_repeat_interleave(2)
    else:
        cache.reset()
        length = 0
    following = tokens[rows, length : length + 1]
    logits = step(following)[:, -1]
    whole = {name: tensor[rows] for name, tensor in source.items()}
    expected = model(**whole, decoder_input_ids=tokens[rows, : length + 1]).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    # the control: one token less of the past is something else
    other = model(**whole, decoder_input_ids=following).logits[:, -1]
    assert length == 0 or (logits - other).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_generation_continues_a_cache(model, source, implementation):
    whole = model.generate(**source, max_new_tokens=8, min_new_tokens=8)
    four = {"max_new_tokens": 4, "min_new_tokens": 4}
    kind = {"cache_implementation": implementation}
    if implementation == "static":
        kind["max_cache_len"] = 40
    begun = model.generate(**source, **four, **kind, return_dict_in_generate=True)
    prompt = {"decoder_input_ids": begun.sequences}
    prompt["decoder_attention_mask"] = torch.ones_like(begun.sequences)  # as for T5: these are all
    assert torch.equal(model.generate(**source, **prompt, **four, cache=begun.cache), whole)


def test_generation_starts_from_a_padded_prompt(model, source):
    """Prompts of the decoder of unequal length, left-padded, give each row what it gives alone."""
    prompts = torch.randint(0, 300, (3, 4), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    prompts[mask.cumsum(-1) == 1] = model.config.decoder_start_token_id
    padded = prompts.masked_fill(mask == 0, model.config.pad_token_id)
    prompt = {"decoder_input_ids": padded, "decoder_attention_mask": mask}
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    for kind in ("dynamic", "static"):
        together = model.generate(**source, **prompt, cache_implementation=kind, **options)
        for row in range(3):
            one = {name: tensor[row : row + 1] for name, tensor in source.items()}
            own = prompts[row : row + 1][:, mask[row].bool()]
            alone = model.generate(**one, decoder_input_ids=own, **options)
            assert torch.equal(together[row, -5:], alone[0, -5:])


@torch.no_grad()
def test_a_cache_of_another_source_or_too_small_is_refused(model, source):
    ids = torch.randint(0, 300, (3, 5), generator=torch.Generator().manual_seed(1))
    cache = model(**source, decoder_input_ids=ids, use_cache=True).cache
    short = {name: tensor[:, :7] for name, tensor in source.items()}
    with pytest.raises(ValueError, match="the cache holds a source of 9 tokens, not of 7"):
        model(**short, decoder_input_ids=ids[:, :1], cache=cache)
    foreign = DynamicCache()  # as PEFT's prefix tuning passes one
    foreign.update(*torch.randn(2, 3, 2, 4, 14), 0)
    with pytest.raises(ValueError, match="the cache holds a source of 0 tokens, not of 9"):
        model(**source, decoder_input_ids=ids, past_key_values=foreign)
    with pytest.raises(ValueError, match="the cache holds a source of 0 tokens, not of 9"):
        model.generate(**source, decoder_input_ids=ids, cache=foreign)
    ordinary = DynamicCache()
    begun = model.generate(**source, max_new_tokens=3, min_new_tokens=3, cache=ordinary)
    with pytest.raises(ValueError, match="the cache holds a source of 9 tokens, not of 7"):
        model.generate(**short, decoder_input_ids=begun, cache=ordinary)
    logits = model(**source, decoder_input_ids=begun[:, -1:], cache=ordinary).logits
    whole = model(**source, decoder_input_ids=begun).logits[:, -1:]
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="holds 12 tokens, but source and target need 15"):
        model.generate(**source, max_new_tokens=6, cache=static_cache(model, 12))
    expected = model.generate(**source, max_new_tokens=6)
    enough = static_cache(model, 15)
    assert torch.equal(model.generate(**source, max_new_tokens=6, cache=enough), expected)


def test_assisted_decoding_is_greedy_decoding(model, source):
    one = {name: tensor[:1] for name, tensor in source.items()} | {"max_new_tokens": 8}
    expected = model.generate(**one)
    torch.manual_seed(1)
    assistant = Qwen3ForSeq2SeqLM(tiny_config(num_hidden_layers=1)).eval()
    assert torch.equal(model.generate(**one, assistant_model=assistant), expected)
    assert torch.equal(model.generate(**one, prompt_lookup_num_tokens=3), expected)
    assert not torch.equal(assistant.generate(**one), expected)


def test_encoder_outputs_are_used_again(model, source):
    expected = model.generate(**source, max_new_tokens=5)
    encoded = model.get_encoder()(**source)
    calls = []
    model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    given = {"encoder_outputs": encoded, "attention_mask": source["attention_mask"]}
    for _ in range(2):
        assert torch.equal(model.generate(**given, max_new_tokens=5), expected)
    assert not calls


def test_streaming_gives_the_text_piece_by_piece(model, source, tokenizer):
    one = {name: tensor[:1] for name, tensor in source.items()}
    options = {"max_new_tokens": 8, "min_new_tokens": 8}
    whole = model.generate(**one, **options)
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**one, **options, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(whole[0], skip_special_tokens=True)


def test_fill_puts_the_spans_where_they_belong(tokenizer):
    model = Qwen3ForSeq2SeqLM(tiny_config(vocab_size=len(tokenizer))).eval()

    def fill(text, answer: str, **options):
        """What the model fills in where it is made to say `answer`."""
        said = tokenizer(answer)["input_ids"]
        model.generation_config.eos_token_id = said[-1]
        options["prefix_allowed_tokens_fn"] = lambda _, ids: [said[min(len(ids), len(said)) - 1]]
        return model.fill(text, tokenizer, **options)

    tokens = {"decoder_start_token_id": 300, "pad_token_id": 300}
    text = "The <extra_id_0> sat on <extra_id_1>.<extra_id_2>"
    # words before the first, out of order, a sentinel twice, one not asked for, one left out
    answer = "eh<extra_id_1>the mat<extra_id_0>cat<extra_id_1>no<extra_id_7>b<|im_end|>"
    filled = "The cat sat on the mat.<extra_id_2>"
    assert fill(text, answer) == filled
    assert fill([text, "<extra_id_1>!"], answer) == [filled, "the mat!"]
    assert fill([], answer) == []
    assert fill(text, answer, return_dict_in_generate=True) == filled
    assert len(fill(text, answer, num_beams=2, num_return_sequences=2)) == 2
    # unfinished: the last span is what there is of it
    for limit in (
        {"max_new_tokens": 2},
        {"max_length": 3},
        {"generation_config": GenerationConfig(max_new_tokens=2, **tokens)},
    ):
        assert fill("<extra_id_0>", "<extra_id_0>bc<|im_end|>", **limit) == "b"
    cpu_offload(model, torch.device("cpu"))
    assert fill(text, answer) == filled


def test_fill_takes_no_other_control_token_out_of_a_text(tokenizer):
    encoded = tokenizer.encode_with_sentinels(["a<|im_end|>b<extra_id_3>", "<extra_id_0>"])
    ids = encoded["input_ids"].tolist()
    sentinels, eos = tokenizer.sentinel_token_ids, tokenizer.eos_token_id
    assert [i for i in ids[0] if i >= 300] == [sentinels[3], eos]
    assert ids[1][:2] == [sentinels[0], eos]
    assert encoded["attention_mask"][1].tolist() == [1, 1] + [0] * (len(ids[0]) - 2)
    # the control: the ordinary call takes it for the end
    assert eos in tokenizer("a<|im_end|>b")["input_ids"]
    for text in ("nothing here", "<extra_id_11>", "<extra_id_03>", "<extra_id_\u0663>"):
        with pytest.raises(ValueError, match="must contain <extra_id_N>"):
            tokenizer.encode_with_sentinels([text])


def test_fill_refuses_a_tokenizer_larger_than_the_model(tokenizer, model):
    model.config.vocab_size = len(tokenizer) - 1
    with pytest.raises(ValueError, match=f"the tokenizer has {len(tokenizer)} entries, the"):
        model.fill("A <extra_id_0>.", tokenizer)
