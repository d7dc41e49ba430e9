"""mteb's tasks in our table, and our tasks among mteb's.

In mteb's retrieval the order of the results decides a tie, so that a model which cannot tell texts
apart scores above zero; our own tasks are therefore scored by our own functions, and `as_mteb` is
for those who compare within mteb.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen3_encdec.evaluation.baselines import NotRun
from qwen3_encdec.evaluation.tasks import Classification, Embed, Retrieval, Similarity, Task
from qwen3_encdec.folders import InputError

MTEB_MAX_TOKENS = 512


@dataclass(frozen=True)
class MtebTask:
    """One task of mteb, scored by mteb."""

    task: Any
    max_tokens: int = MTEB_MAX_TOKENS

    @property
    def name(self) -> str:
        """mteb's name of it."""
        return self.task.metadata.name

    @property
    def metric(self) -> str:
        """mteb's main score of it."""
        return self.task.metadata.main_score

    @property
    def corpus(self) -> list[str]:
        """Nothing: what mteb will ask is not known beforehand, so that TF-IDF is not run."""
        return []

    @property
    def size(self) -> int:
        """Splits and subsets that the score is a mean of."""
        return len(self.task.eval_splits) * len(self.task.hf_subsets)

    def measure(self, embed: Embed) -> dict[str, float]:
        """`score`; mteb gives no interval. Raises NotRun if the data cannot be had."""
        import mteb

        if not self.task.data_loaded:
            try:
                self.task.load_data()
            except Exception as error:  # the hub client raises a dozen unrelated types
                raise NotRun(
                    f"its data cannot be loaded: {str(error).strip().partition(chr(10))[0]}"
                ) from None
        results = mteb.evaluate(mteb_model(embed), self.task, cache=None, show_progress_bar=False)
        return {"score": float(results.task_results[0].get_score())}


def mteb_tasks(name: str) -> list[Task]:
    """The tasks of a benchmark, such as "MTEB(eng, v2)", or one task, such as "STSBenchmark".

    Raises:
        NotRun: mteb is not installed.
        InputError: mteb knows neither.
    """
    try:
        import mteb
    except ModuleNotFoundError:
        raise NotRun("pip install mteb") from None
    try:
        return [MtebTask(task) for task in mteb.get_benchmark(name).tasks]
    except KeyError:
        pass
    try:
        return [MtebTask(mteb.get_task(name))]
    except KeyError:
        raise InputError(f"mteb knows neither a benchmark nor a task {name!r}") from None


def mteb_model(embed: Embed, name: str = "qwen3-encdec/embedder") -> Any:
    """An embedder as mteb's encoder."""
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder

    class Encoder(AbsEncoder):
        mteb_model_meta = ModelMeta.create_empty(
            {"name": name, "revision": "local", "modalities": ["text"]}
        )

        def encode(self, inputs: Any, **kwargs: Any) -> np.ndarray:
            return embed([text for batch in inputs for text in batch["text"]])

    return Encoder()


def as_mteb(task: Retrieval | Classification | Similarity) -> Any:
    """One of our tasks as a task of mteb, with its data in memory."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    data: Any
    if isinstance(task, Retrieval):
        base, kind, score = AbsTaskRetrieval, "Retrieval", "hit_rate_at_1"
        split = {
            "corpus": Dataset.from_dict({"id": _ids("d", task.documents), "text": task.documents}),
            "queries": Dataset.from_dict({"id": _ids("q", task.queries), "text": task.queries}),
            "relevant_docs": {f"q{i}": {f"d{right}": 1} for i, right in enumerate(task.relevant)},
            "top_ranked": None,
        }
        data = {"default": {"test": split}}
    elif isinstance(task, Classification):
        base, kind, score = AbsTaskClassification, "Classification", "accuracy"
        train = {"text": task.train_texts, "label": task.train_labels.tolist()}
        test = {"text": task.texts, "label": task.labels.tolist()}
        data = DatasetDict(train=Dataset.from_dict(train), test=Dataset.from_dict(test))
    else:
        base, kind, score = AbsTaskSTS, "STS", "cosine_pearson"
        first, second = np.triu_indices(len(task.texts), k=1)
        columns = {
            "sentence1": [task.texts[i] for i in first],
            "sentence2": [task.texts[j] for j in second],
        }
        data = DatasetDict(
            test=Dataset.from_dict(columns | {"score": task.judgements[first, second].tolist()})
        )

    class Local(base):  # type: ignore[misc, valid-type]
        metadata = TaskMetadata(
            name="Qwen3Encdec" + task.name.title().replace(" ", "").replace("-", ""),
            description=f"{task.name} of qwen3-encdec, made of what is installed.",
            dataset={"path": "local", "revision": "local"},
            type=kind,
            eval_langs=["eng-Latn"],
            main_score=score,
            modalities=["text"],
            eval_splits=["test"],
        )

        def load_data(self, **kwargs: Any) -> None:
            self.dataset, self.data_loaded = data, True

    return Local()


def _ids(letter: str, texts: list[str]) -> list[str]:
    return [f"{letter}{i}" for i in range(len(texts))]
