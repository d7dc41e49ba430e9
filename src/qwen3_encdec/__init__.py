"""Qwen3 as an encoder-decoder:

merged attention, UL2 training, and a text encoder to take out of it.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from .configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from .modeling_qwen3_encdec import Qwen3EncoderDecoderModel, Qwen3ForSeq2SeqLM
from .modeling_qwen3_encoder import (
    Qwen3Encoder,
    Qwen3EncoderForSequenceClassification,
    Qwen3EncoderForTokenClassification,
    Qwen3EncoderModel,
)
from .tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer

__version__ = "0.1.0"

AutoConfig.register("qwen3_encdec", Qwen3EncoderDecoderConfig, exist_ok=True)
AutoModel.register(Qwen3EncoderDecoderConfig, Qwen3EncoderDecoderModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM, exist_ok=True)
AutoTokenizer.register(
    Qwen3EncoderDecoderConfig, fast_tokenizer_class=Qwen3EncoderDecoderTokenizer, exist_ok=True
)
AutoModelForSequenceClassification.register(
    Qwen3EncoderDecoderConfig, Qwen3EncoderForSequenceClassification, exist_ok=True
)
AutoModelForTokenClassification.register(
    Qwen3EncoderDecoderConfig, Qwen3EncoderForTokenClassification, exist_ok=True
)

# save_pretrained writes the files of the classes beside the weights and their places into
# config.json: the folder then also loads where this package is not installed.
Qwen3EncoderDecoderConfig.register_for_auto_class()
Qwen3EncoderDecoderTokenizer.register_for_auto_class()
Qwen3EncoderDecoderModel.register_for_auto_class("AutoModel")
Qwen3ForSeq2SeqLM.register_for_auto_class("AutoModelForSeq2SeqLM")
Qwen3EncoderForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
Qwen3EncoderForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "Qwen3Encoder",
    "Qwen3EncoderDecoderConfig",
    "Qwen3EncoderDecoderModel",
    "Qwen3EncoderDecoderTokenizer",
    "Qwen3EncoderForSequenceClassification",
    "Qwen3EncoderForTokenClassification",
    "Qwen3EncoderModel",
    "Qwen3ForSeq2SeqLM",
]
