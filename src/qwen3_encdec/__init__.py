"""Qwen3 as an encoder-decoder: merged attention, UL2 training, and a text encoder to take out of it."""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

from .configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from .modeling_qwen3_encdec import Qwen3EncoderDecoderModel, Qwen3ForSeq2SeqLM
from .modeling_qwen3_encoder import Qwen3Encoder
from .tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer

__version__ = "0.1.0"

AutoConfig.register("qwen3_encdec", Qwen3EncoderDecoderConfig, exist_ok=True)
AutoModel.register(Qwen3EncoderDecoderConfig, Qwen3EncoderDecoderModel, exist_ok=True)
AutoModelForSeq2SeqLM.register(Qwen3EncoderDecoderConfig, Qwen3ForSeq2SeqLM, exist_ok=True)
AutoTokenizer.register(Qwen3EncoderDecoderConfig, fast_tokenizer_class=Qwen3EncoderDecoderTokenizer, exist_ok=True)

__all__ = [
    "Qwen3Encoder",
    "Qwen3EncoderDecoderConfig",
    "Qwen3EncoderDecoderModel",
    "Qwen3EncoderDecoderTokenizer",
    "Qwen3ForSeq2SeqLM",
]
