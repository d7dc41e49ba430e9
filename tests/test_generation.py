"""Generation in every form that transformers offers an encoder-decoder, and infilling."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextIteratorStreamer

from qwen3_encdec import Qwen3ForSeq2SeqLM
from qwen3_encdec.modeling_qwen3_decoder import SourceDynamicCache, SourceStaticCache
from qwen3_encdec.tokenization_qwen3_encdec import build_tokenizer
from tests.conftest import tiny_config

S = 9


@pytest.fixture
def source() -> dict[str, torch.Tensor]:
    """Three texts, one padded on each side."""
    ids = torch.randint(0, 300, (3, S), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(num_sentinel_tokens=11, num_ranks=300)


def test_static_cache_and_a_step_compiled_as_one_graph(model, source):
    expected = model.generate(**source, max_new_tokens=6)
    static = model.generate(**source, max_new_tokens=6, cache_implementation="static")
    assert torch.equal(static, expected)
    config = model.config.get_text_config(decoder=True)
    cache = StaticCache(config=config, max_cache_len=S + 16)
    inputs = {
        "encoder_outputs": model.get_encoder()(**source),
        "attention_mask": source["attention_mask"],
        "cache": cache,
    }
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    token, tokens = expected[:, :1], []
    with torch.no_grad():
        for forward in (model, step, step, step):
            token = forward(decoder_input_ids=token, **inputs).logits[:, -1:].argmax(-1)
            tokens.append(token)
    assert torch.equal(torch.cat(tokens, 1), expected[:, 1:5])
    # the control: without the mask the padding is read
    blind = model.generate(input_ids=source["input_ids"], max_new_tokens=6)
    assert blind.shape != expected.shape or not torch.equal(blind, expected)


@torch.no_grad()
def test_a_compiled_step_neither_projects_nor_copies_the_source(model, source):
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=S + 16)
    inputs = {"encoder_outputs": model.get_encoder()(**source), "cache": cache}
    token = torch.full((3, 1), 7)
    model(decoder_input_ids=token, **inputs)
    graphs = []

    def look(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(model.forward, fullgraph=True, backend=look)(decoder_input_ids=token, **inputs)
    (graph,) = graphs
    assert not [node for node in graph.graph.nodes if node.target is torch.cat and 2 in node.args]
    # the control: the first step does concatenate
    graphs.clear()
    inputs["cache"] = StaticCache(
        config=model.config.get_text_config(decoder=True), max_cache_len=S + 16
    )
    torch.compile(model.forward, fullgraph=True, backend=look)(decoder_input_ids=token, **inputs)
    assert [n for n in graphs[0].graph.nodes if n.target is torch.cat and 2 in n.args]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static", "ordinary"])
@pytest.mark.parametrize("change", ["reorder", "crop", "repeat", "reset"])
def test_whatever_changes_a_cache_is_honoured(model, source, change, kind):
    tokens = torch.randint(0, 300, (3, 80), generator=torch.Generator().manual_seed(1))
    encoded = model.get_encoder()(**source)
    config = model.config.get_text_config(decoder=True)
    if kind == "static":
        if change == "repeat":
            pytest.skip("a static cache has a fixed batch")
        cache = SourceStaticCache(config=config, max_cache_len=S + 16)
    else:
        cache = SourceDynamicCache() if kind == "dynamic" else DynamicCache()
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
    begun = model.generate(
        **source,
        max_new_tokens=4,
        min_new_tokens=4,
        return_dict_in_generate=True,
        cache_implementation=implementation,
        max_cache_len=40 if implementation == "static" else None,
    )
    options = {
        "decoder_input_ids": begun.sequences,
        "decoder_attention_mask": torch.ones_like(begun.sequences),  # as for T5: these are all
        "max_new_tokens": 4,
        "min_new_tokens": 4,
    }
    assert torch.equal(model.generate(**source, cache=begun.cache, **options), whole)


def test_generation_starts_from_a_padded_prompt(model, source):
    """Prompts of the decoder of unequal length, left-padded, give each row what it gives alone."""
    prompts = torch.randint(0, 300, (3, 4), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    prompts[mask.cumsum(-1) == 1] = model.config.decoder_start_token_id
    padded = prompts.masked_fill(mask == 0, model.config.pad_token_id)
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    for static in (None, "static"):
        together = model.generate(
            **source,
            decoder_input_ids=padded,
            decoder_attention_mask=mask,
            cache_implementation=static,
            **options,
        )
        for row in range(3):
            one = {name: tensor[row : row + 1] for name, tensor in source.items()}
            prompt = prompts[row : row + 1][:, mask[row].bool()]
            alone = model.generate(**one, decoder_input_ids=prompt, **options)
            assert torch.equal(together[row, -5:], alone[0, -5:])


@torch.no_grad()
def test_a_cache_is_used_or_refused_but_never_dropped(model, source):
    ids = torch.randint(0, 300, (3, 5), generator=torch.Generator().manual_seed(1))
    cache = SourceDynamicCache()
    model(**source, decoder_input_ids=ids[:, :3], cache=cache)
    expected = model(**source, decoder_input_ids=ids).logits[:, 3:]
    labels = ids[:, 3:]
    for options in ({"use_cache": False}, {"labels": labels}):
        cache_now = copy.deepcopy(cache)
        output = model(**source, decoder_input_ids=ids[:, 3:], cache=cache_now, **options)
        torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    model.train().gradient_checkpointing_enable()
    refused = pytest.raises(
        ValueError, match="a cache cannot be used with .* gradient checkpointing"
    )
    with torch.enable_grad(), refused:
        model(**source, decoder_input_ids=ids[:, 3:], cache=cache)


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
    config = model.config.get_text_config(decoder=True)
    with pytest.raises(ValueError, match="holds 12 tokens, but source and target need 15"):
        model.generate(**source, max_new_tokens=6, cache=StaticCache(config, max_cache_len=12))
    enough = StaticCache(config, max_cache_len=15)
    expected = model.generate(**source, max_new_tokens=6)
    assert torch.equal(model.generate(**source, max_new_tokens=6, cache=enough), expected)


def test_assisted_decoding_is_greedy_decoding(model, source):
    one = {name: tensor[:1] for name, tensor in source.items()}
    expected = model.generate(**one, max_new_tokens=8)
    torch.manual_seed(1)
    assistant = Qwen3ForSeq2SeqLM(tiny_config(num_hidden_layers=1)).eval()
    assert torch.equal(model.generate(**one, max_new_tokens=8, assistant_model=assistant), expected)
    assert torch.equal(
        model.generate(**one, max_new_tokens=8, prompt_lookup_num_tokens=3), expected
    )
    alone = assistant.generate(**one, max_new_tokens=8)
    assert alone.shape != expected.shape or not torch.equal(alone, expected)


def test_encoder_outputs_are_used_again(model, source):
    expected = model.generate(**source, max_new_tokens=5)
    encoded = model.get_encoder()(**source)
    calls = []
    model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        again = model.generate(
            encoder_outputs=encoded, attention_mask=source["attention_mask"], max_new_tokens=5
        )  # fmt: skip
        assert torch.equal(again, expected)
    assert not calls


@pytest.mark.parametrize("length", [5_000, pytest.param(33_000, marks=pytest.mark.slow)])
def test_sources_longer_than_anything_usual(length):
    torch.manual_seed(0)
    model = Qwen3ForSeq2SeqLM(tiny_config(num_hidden_layers=1)).eval()
    ids = torch.randint(0, 300, (1, length))
    tokens = model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3)
    assert tokens.shape == (1, 4)
    with torch.no_grad():
        logits = [
            model(input_ids=source, decoder_input_ids=tokens[:, :1]).logits
            for source in (ids, ids[:, 1:])
        ]
    assert (logits[0] - logits[1]).abs().max() > 0  # its first token is not forgotten


def test_streaming_gives_the_text_piece_by_piece(model, source, tokenizer):
    one = {name: tensor[:1] for name, tensor in source.items()}
    whole = model.generate(**one, max_new_tokens=8, min_new_tokens=8)
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**one, max_new_tokens=8, min_new_tokens=8, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(whole[0], skip_special_tokens=True)


def answering(model, answer: list[int]):
    """The model, made to say `answer`."""

    def force(batch: int, ids: torch.Tensor) -> list[int]:
        return [answer[min(len(ids) - 1, len(answer) - 1)]]

    model.generation_config.eos_token_id = answer[-1]
    return {"prefix_allowed_tokens_fn": force}


def test_fill_puts_the_spans_where_they_belong(tokenizer):
    torch.manual_seed(0)
    model = Qwen3ForSeq2SeqLM(
        tiny_config(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()
    marks, eos = tokenizer.sentinel_token_ids, tokenizer.eos_token_id

    def ids(text: str) -> list[int]:
        return tokenizer(text, split_special_tokens=True)["input_ids"]

    text = "The <extra_id_0> sat on <extra_id_1>.<extra_id_2>"
    # out of order, a sentinel twice, one that was not asked for, one left out, words before the
    # first
    answer = [
        *ids("eh"),
        marks[1],
        *ids("the mat"),
        marks[0],
        *ids("cat"),
        marks[1],
        *ids("no"),
        marks[7],
        65,
        eos,
    ]
    filled = model.fill(text, tokenizer, **answering(model, answer))
    assert filled == "The cat sat on the mat.<extra_id_2>"
    both = model.fill([text, "<extra_id_1>!"], tokenizer, **answering(model, answer))
    assert both == [filled, "the mat!"]
    assert model.fill([], tokenizer) == []
    options = answering(model, answer) | {"return_dict_in_generate": True}
    assert model.fill(text, tokenizer, **options) == filled
    assert (
        len(
            model.fill(
                text, tokenizer, num_beams=2, num_return_sequences=2, **answering(model, answer)
            )
        )
        == 2
    )
    # unfinished: the last span is what there is of it
    assert (
        model.fill(
            "<extra_id_0>", tokenizer, max_new_tokens=2, **answering(model, [marks[0], 65, 66, eos])
        )
        == "b"
    )


def test_fill_takes_no_other_control_token_out_of_a_text(tokenizer):
    encoded = tokenizer.encode_with_sentinels(["a<|im_end|>b<extra_id_3>", "<extra_id_0>"])
    ids = encoded["input_ids"].tolist()
    special = set(tokenizer.all_special_ids) | set(range(300, len(tokenizer)))
    assert [i for i in ids[0] if i in special] == [
        tokenizer.sentinel_token_ids[3],
        tokenizer.eos_token_id,
    ]
    assert ids[1][:2] == [tokenizer.sentinel_token_ids[0], tokenizer.eos_token_id]
    assert encoded["attention_mask"][1].tolist() == [1, 1] + [0] * (len(ids[0]) - 2)
    # the control: the ordinary call takes it for the end
    assert tokenizer.eos_token_id in tokenizer("a<|im_end|>b")["input_ids"]
    for text in ("nothing here", "<extra_id_11>", "<extra_id_03>", "<extra_id_\u0663>"):
        with pytest.raises(ValueError, match="must contain <extra_id_N>"):
            tokenizer.encode_with_sentinels([text])
