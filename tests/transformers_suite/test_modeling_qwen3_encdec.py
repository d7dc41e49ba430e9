"""transformers' own common test suites over our classes.

To be run inside a checkout of transformers, as
tests/models/qwen3_encdec/test_modeling_qwen3_encdec.py; see run.py.
"""

import unittest
from unittest.mock import patch

import pytest
import torch
from transformers import StaticCache
from transformers.models.auto import modeling_auto
from transformers.testing_utils import require_torch, torch_device

from qwen3_encdec import (
    Qwen3EncoderDecoderConfig,
    Qwen3EncoderDecoderModel,
    Qwen3EncoderForSequenceClassification,
    Qwen3EncoderForTokenClassification,
    Qwen3EncoderModel,
    Qwen3ForSeq2SeqLM,
)
from qwen3_encdec.modeling_qwen3_decoder import SourcePrefix

from ... import test_modeling_common
from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, ids_tensor

# The suites know by name which class has no loss and which takes the labels of a
# sequence-to-sequence model.
modeling_auto.MODEL_MAPPING_NAMES["qwen3_encdec"] = "Qwen3EncoderDecoderModel"
modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES["qwen3_encdec"] = "Qwen3ForSeq2SeqLM"
modeling_auto.MODEL_MAPPING_NAMES["qwen3_encdec_encoder"] = "Qwen3EncoderModel"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["qwen3_encdec"] = (
    "Qwen3EncoderForSequenceClassification"
)
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["qwen3_encdec"] = (
    "Qwen3EncoderForTokenClassification"
)


class Qwen3EncoderDecoderModelTester:
    """Odd sizes: source longer than target, heads wider than hidden / heads, masks with holes and
    empty rows.
    """

    is_training = True
    batch_size = 13
    encoder_seq_length = 9
    seq_length = decoder_seq_length = 7
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return Qwen3EncoderDecoderConfig(
            vocab_size=self.vocab_size,
            num_sentinel_tokens=5,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            head_dim=10,
            max_position_embeddings=512,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        source = [self.batch_size, self.encoder_seq_length]
        target = [self.batch_size, self.seq_length]
        decoder_input_ids = ids_tensor(target, self.vocab_size - 3) + 3
        decoder_input_ids[:, 0] = (
            config.decoder_start_token_id
        )  # or generate() puts it there and the mask is too short
        return config, {
            "input_ids": ids_tensor(source, self.vocab_size - 3) + 3,
            "attention_mask": ids_tensor(source, 2),
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": ids_tensor(target, 2),
        }


class OurModelTesterMixin(ModelTesterMixin):
    test_can_init_all_missing_weights_before_2023 = (
        True  # that is: whatever the year in the file's header
    )

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(
            self,
            config_class=Qwen3EncoderDecoderConfig,
            hidden_size=37,
            vocab_size=99,
            num_sentinel_tokens=5,
        )

    def test_config(self):
        self.config_tester.run_common_tests()


@require_torch
class Qwen3EncoderDecoderModelTest(OurModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    model_tester_class = Qwen3EncoderDecoderModelTester
    all_model_classes = (Qwen3EncoderDecoderModel, Qwen3ForSeq2SeqLM)
    is_encoder_decoder = True

    def setUp(self):
        super().setUp()
        if "eager_matches_sdpa" in self._testMethodName:
            # The suite takes the target's mask from the source's: they must be of one length.
            self.model_tester.encoder_seq_length = self.model_tester.seq_length

    def test_generate_compile_model_forward_fullgraph(self):
        """As in the suite, which looks for the target's half of a pair of caches; ours is one."""
        itself = property(lambda cache: cache)
        with patch.object(SourcePrefix, "self_attention_cache", itself, create=True):
            super().test_generate_compile_model_forward_fullgraph()

    def _check_cache_for_generate(self, batch_size, cache, seq_length, config):
        """As in the suite; the source is a prefix of the cache."""
        length = seq_length + cache.source_length
        super()._check_cache_for_generate(batch_size, cache, length, config)

    def _check_attentions_for_generate(self, *arguments, decoder_cache, **options):
        """As in the suite, which asks a static cache how many target tokens it has room for."""
        if not isinstance(decoder_cache, StaticCache):
            options["decoder_cache"] = decoder_cache
            return super()._check_attentions_for_generate(*arguments, **options)
        room = decoder_cache.get_max_length() - decoder_cache.source_length
        with patch.object(decoder_cache, "get_max_length", lambda layer_idx=0: room):
            super()._check_attentions_for_generate(
                *arguments, decoder_cache=decoder_cache, **options
            )

    @unittest.skip(
        "weights on encoder and on decoder keys are views of joint ones, which the output comes of"
    )
    def test_retain_grad_hidden_states_attentions(self):
        pass

    def test_forward_with_logits_to_keep(self):
        """As in the suite, which takes the number of logits from `input_ids`."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = Qwen3ForSeq2SeqLM(config).to(torch_device).eval()
        logits = model(**inputs, logits_to_keep=0).logits
        assert tuple(logits.shape) == (13, 7, 99)
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, logits[:, -2:])

    def test_custom_4d_attention_mask(self):
        """Three continuations of one prefix as three rows, and as one row whose mask keeps them
        apart.
        """
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        model = Qwen3ForSeq2SeqLM(config).to(torch_device).eval()
        source = ids_tensor([1, 5], self.model_tester.vocab_size)
        prefix, ends = ids_tensor([1, 3], 99), ids_tensor([3, 1], 99)
        rows = model(
            input_ids=source.expand(3, -1),
            decoder_input_ids=torch.cat([prefix.expand(3, -1), ends], dim=1),
        ).logits[:, -1]
        mask = torch.ones(6, 6, dtype=torch.bool, device=torch_device).tril()
        mask[4, 3] = mask[5, 3] = mask[5, 4] = False

        def one_row(mask):
            mask = torch.cat([torch.ones_like(mask[:, :5]), mask], 1)  # before them, the source
            return model(
                input_ids=source,
                decoder_input_ids=torch.cat([prefix, ends.T], dim=1),
                decoder_attention_mask=mask[None, None],
                decoder_position_ids=torch.tensor([[0, 1, 2, 3, 3, 3]], device=torch_device),
            ).logits[0, -3:]

        torch.testing.assert_close(one_row(mask), rows, rtol=1e-4, atol=1e-5)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(
                one_row(torch.ones_like(mask).tril()), rows, rtol=1e-4, atol=1e-5
            )


class Qwen3EncoderModelTester(Qwen3EncoderDecoderModelTester):
    """The encoder by itself: source only."""

    seq_length = Qwen3EncoderDecoderModelTester.encoder_seq_length

    def get_config(self):
        config = super().get_config()
        # As T5's encoder-only tester gives it; our configuration overrides the argument, so it is
        # set afterwards. The common suite asks it whether outputs and inputs have the prefixes
        # `encoder_` and `decoder_`.
        config.is_encoder_decoder = False
        return config

    def prepare_config_and_inputs_for_common(self):
        source = [self.batch_size, self.encoder_seq_length]
        return self.get_config(), {
            "input_ids": ids_tensor(source, self.vocab_size - 3) + 3,
            "attention_mask": ids_tensor(source, 2),
        }


@require_torch
class Qwen3EncoderModelTest(OurModelTesterMixin, unittest.TestCase):
    model_tester_class = Qwen3EncoderModelTester
    all_model_classes = (
        Qwen3EncoderModel,
        Qwen3EncoderForSequenceClassification,
        Qwen3EncoderForTokenClassification,
    )

    def test_load_with_mismatched_shapes(self):
        """As in the suite, whose AutoModel gives the whole encoder-decoder here."""
        with patch.object(test_modeling_common, "AutoModel", Qwen3EncoderModel):
            super().test_load_with_mismatched_shapes()
