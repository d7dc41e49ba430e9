"""Qwen3 as an encoder-decoder: merged attention, UL2 training, and a text encoder to take out.

Importing the package costs nothing: torch and transformers are loaded on first use of a class, so
that a command answers `--help` and a wrong setting at once. The classes are registered with
transformers' Auto classes as soon as either are loaded, whichever comes first.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULE_OF = {
    "Qwen3Encoder": "modeling_qwen3_encoder",
    "Qwen3EncoderDecoderConfig": "configuration_qwen3_encdec",
    "Qwen3EncoderDecoderModel": "modeling_qwen3_encdec",
    "Qwen3EncoderDecoderTokenizer": "tokenization_qwen3_encdec",
    "Qwen3EncoderForSequenceClassification": "modeling_qwen3_encoder",
    "Qwen3EncoderForTokenClassification": "modeling_qwen3_encoder",
    "Qwen3EncoderModel": "modeling_qwen3_encoder",
    "Qwen3ForSeq2SeqLM": "modeling_qwen3_encdec",
}
_OURS = {f"{__name__}.{module}" for module in _MODULE_OF.values()}
_AUTO = {f"transformers.models.auto.{kind}_auto" for kind in ("configuration", "modeling")}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Register the classes with transformers' Auto classes.

    `register_for_auto_class` makes `save_pretrained` write the files of the classes beside the
    weights and name them in config.json: a folder loads where this package is not installed.
    """
    import transformers as hf

    this = sys.modules[__name__]
    config, tokenizer = this.Qwen3EncoderDecoderConfig, this.Qwen3EncoderDecoderTokenizer
    hf.AutoConfig.register(config.model_type, config, exist_ok=True)
    hf.AutoTokenizer.register(config, fast_tokenizer_class=tokenizer, exist_ok=True)
    config.register_for_auto_class()
    tokenizer.register_for_auto_class()
    for auto, model in (
        (hf.AutoModel, this.Qwen3EncoderDecoderModel),
        (hf.AutoModelForSeq2SeqLM, this.Qwen3ForSeq2SeqLM),
        (hf.AutoModelForSequenceClassification, this.Qwen3EncoderForSequenceClassification),
        (hf.AutoModelForTokenClassification, this.Qwen3EncoderForTokenClassification),
    ):
        auto.register(config, model, exist_ok=True)
        model.register_for_auto_class(auto.__name__)


class _ImportWatcher(MetaPathFinder):
    """Calls `_register` once, when modules of ours or Auto classes have been imported.

    It waits for the outermost import to end: until then modules that `_register` needs may be half
    executed.
    """

    depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module as Python would, and count its execution."""
        if fullname not in _OURS and not fullname.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self.depth += 1
            try:
                execute(module)
            finally:
                self.depth -= 1
            if self.depth == 0 and self in sys.meta_path and sys.modules.keys() & (_OURS | _AUTO):
                sys.meta_path.remove(self)
                _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if sys.modules.keys() & _AUTO:
    _register()
else:
    sys.meta_path.insert(0, _ImportWatcher())
