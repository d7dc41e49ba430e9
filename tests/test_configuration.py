import json
from pathlib import Path

import pytest
from transformers import AutoConfig, Qwen3Config

import qwen3_encdec
from qwen3_encdec import Qwen3EncoderDecoderConfig
from tests.conftest import tiny_config


def test_defaults_are_qwen3_0_6b_with_100_sentinels():
    config = Qwen3EncoderDecoderConfig()
    sizes = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    assert sizes == (1024, 3072, 28)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 8, 128)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (40_960, 1e-6)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert config.vocab_size == 151_936 + 100
    assert config.decoder_start_token_id == config.pad_token_id != config.eos_token_id
    assert config.is_encoder_decoder


def test_shipped_default_config_is_the_default():
    shipped = Path(qwen3_encdec.__file__).parent / "configs" / "default_config.json"
    config = Qwen3EncoderDecoderConfig(**json.loads(shipped.read_text()))
    assert config.to_dict() == Qwen3EncoderDecoderConfig().to_dict()


def test_round_trip_through_a_folder(tmp_path):
    config = tiny_config(num_decoder_layers=2)
    config.save_pretrained(tmp_path)
    for loader in (Qwen3EncoderDecoderConfig, AutoConfig):
        loaded = loader.from_pretrained(tmp_path)
        assert isinstance(loaded, Qwen3EncoderDecoderConfig)
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)


@pytest.mark.parametrize(
    "sizes",
    [  # the published dense Qwen3 checkpoints
        (1024, 3072, 28, 16, 8), (2048, 6144, 28, 16, 8), (2560, 9728, 36, 32, 8),
        (4096, 12288, 36, 32, 8), (5120, 17408, 40, 40, 8), (5120, 25600, 64, 64, 8),
    ],
)  # fmt: skip
def test_every_dense_qwen3_is_accepted(sizes):
    rope = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}
    rope["original_max_position_embeddings"] = 32_768
    source = Qwen3Config(**dict(zip(SIZES, sizes, strict=True)), rope_parameters=rope)
    config = Qwen3EncoderDecoderConfig.from_qwen3_config(source)
    assert tuple(getattr(config, name) for name in SIZES) == sizes
    assert config.num_decoder_layers == config.num_hidden_layers
    assert config.rope_parameters == rope
    assert config.vocab_size == source.vocab_size + 100


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"hiden_size": 3}, "'hiden_size' is not used .* did you mean 'hidden_size'"),
        ({"sliding_window": 4096}, "'sliding_window' is not used"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 does not divide"),
        ({"head_dim": 13}, "head_dim=13 is odd"),
        ({"num_decoder_layers": 0}, "num_decoder_layers=0 is not between 1 and"),
        ({"num_decoder_layers": 4}, "num_decoder_layers=4 is not between 1 and .*layers=3"),
        ({"num_decoder_layers": "2"}, "num_decoder_layers='2' is not between 1 and"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder=False"),
        ({"num_sentinel_tokens": 331}, "num_sentinel_tokens=331 is not between"),
        ({"pad_token_id": 331}, "pad_token_id=331 is outside"),
    ],
)
def test_wrong_fields_are_refused_by_name(field, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**field)


def test_sources_that_are_no_dense_qwen3_are_refused():
    with pytest.raises(ValueError, match="'qwen3_encdec' is not a dense Qwen3"):
        Qwen3EncoderDecoderConfig.from_qwen3_config(tiny_config())
    windowed = Qwen3Config(
        use_sliding_window=True, sliding_window=64, max_window_layers=1, num_hidden_layers=3
    )
    with pytest.raises(ValueError, match="sliding-window"):
        Qwen3EncoderDecoderConfig.from_qwen3_config(windowed)


def test_a_saved_field_of_the_wrong_type_is_one_sentence():
    with pytest.raises(ValueError, match=r"^Field 'hidden_size' expected int, got str"):
        Qwen3EncoderDecoderConfig.from_dict({"hidden_size": "large"})
