"""Turn Qwen3 into an encoder-decoder, train it on UL2, and extract a text encoder.

torch and transformers load on first use of a class, which also registers the Auto classes.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # as transformers does; each module has an __all__
    from .configuration_qwen3_encdec import *  # noqa: F403
    from .modeling_qwen3_encdec import *  # noqa: F403
    from .modeling_qwen3_encoder import *  # noqa: F403
    from .tokenization_qwen3_encdec import *  # noqa: F403

__version__ = "0.1.0"

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
__all__ = list(_MODULE_OF)
_AUTO = {f"transformers.models.auto.{kind}_auto" for kind in ("configuration", "modeling")}
_REGISTERED = _AUTO | {f"{__name__}.{module}" for module in _MODULE_OF.values()}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def _register() -> None:
    """Register the Auto classes, and mark the source files to be saved with a model."""
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
    """Calls `_register` once an outermost import has loaded our classes or the Auto classes.

    A module that is still being executed must not be imported from.
    """

    depth = 0

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if not fullname.startswith((f"{__name__}.", "transformers.")):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                self.depth += 1
                try:
                    execute(module)
                finally:
                    self.depth -= 1
                if not self.depth and self in sys.meta_path and _REGISTERED & sys.modules.keys():
                    sys.meta_path.remove(self)
                    _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if sys.modules.keys() & _AUTO:
    _register()
else:
    sys.meta_path.insert(0, _ImportWatcher())
