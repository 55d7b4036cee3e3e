"""SeaDoc as a task of mteb: pages in Lao, Thai, Vietnamese and Malay, found by English queries.

Xiao et al. 2025 (arXiv 2510.11693): 5,091 pages, 1,001 queries, each answered by one page. Published as three tables.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Value, concatenate_datasets, load_dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import fingerprint

COLUMNS = {
    "corpus": ("id", "image"),
    "query": ("id", "text"),
    "qrels": ("query-id", "corpus-id", "score"),
}
CODES = {
    "lao": "lao lo",
    "thai": "thai tha th",
    "vietnamese": "vietnamese vie vi",
    "malay": "malay msa zsm ms",
}
LANGUAGES = {code: name for name, codes in CODES.items() for code in codes.split()}
logger = logging.getLogger(__name__)


class SeaDoc(AbsTaskRetrieval):
    """path: a folder with parquet files in a folder for each of `COLUMNS`, or a hub id with a config for each.

    Scores hold ndcg_at_10 over all queries and ndcg_at_10_lao and so on over those whose page is in that language, each
    among all pages. The language is the column `language` of the page, else what its id begins with (lo_12, thai-3),
    else the same of the query. Raises naming the table, row and id where tables are missing or do not match.
    """

    metadata = TaskMetadata(
        name="SeaDoc",
        description="Retrieve the page of a Southeast Asian document that answers an English query.",
        type="DocumentUnderstanding",
        category="t2i",
        modalities=["text", "image"],
        dataset={"path": "SeaDoc", "revision": "hub"},
        reference="https://arxiv.org/abs/2510.11693",
        eval_splits=["test"],
        eval_langs=["eng-Latn", "lao-Laoo", "tha-Thai", "vie-Latn", "zsm-Latn"],
        main_score="ndcg_at_10",
    )

    def __init__(self, path: str):
        super().__init__()
        files = sorted(Path(path).expanduser().rglob("*.parquet"))
        revision = (
            fingerprint((file.name, file.stat()) for file in files).split()[-1] if files else "hub"
        )
        self.metadata = self.metadata.model_copy(
            update={"dataset": {"path": path, "revision": revision}}
        )
        self.language_of: dict[str, str] = {}  # query -> its page's

    def load_data(self, **_: Any) -> None:
        """Read the tables, and check that they belong together."""
        path, relevant = self.metadata.dataset["path"], defaultdict(dict)
        tables = {name: _table(path, name) for name in COLUMNS}
        spoken = {
            name: _languages(tables[name], f"--seadoc={path}: {name}")
            for name in ("corpus", "query")
        }
        for row, (query, page, score) in enumerate(
            zip(*(tables["qrels"][x] for x in COLUMNS["qrels"]), strict=True)
        ):
            for table, value in (("query", query), ("corpus", page)):
                if value not in spoken[table]:
                    raise LcoError(
                        f"--seadoc={path}: qrels, row {row}: its {table}-id {value!r} is not in {table}"
                    )
            relevant[query][page] = int(score)
            if score > 0:
                self.language_of[query] = spoken["corpus"][page] or spoken["query"][query]
        if not self.language_of:
            raise LcoError(
                f"--seadoc={path}: qrels has no score above 0, so no query has an answer"
            )
        if not any(self.language_of.values()):
            logger.warning(
                "SeaDoc: neither a column `language` nor the ids tell languages; one score is over all"
            )
        corpus, queries = (
            tables[name].select_columns(list(COLUMNS[name])) for name in ("corpus", "query")
        )
        queries = queries.select(
            [row for row, query in enumerate(queries["id"]) if query in self.language_of]
        )
        data = {
            "corpus": corpus,
            "queries": queries,
            "relevant_docs": dict(relevant),
            "top_ranked": None,
        }
        self.dataset, self.data_loaded = {"default": {"test": data}}, True

    def task_specific_scores(
        self, scores: Mapping[str, Mapping[str, float]], *_: Any, **__: Any
    ) -> dict[str, float]:
        """nDCG@10 by language."""
        found = defaultdict(list)
        for query, score in scores.items():
            if language := self.language_of[query]:
                found[f"ndcg_at_10_{language}"].append(score["ndcg_cut_10"])
        return {name: float(np.mean(found[name])) for name in sorted(found)}


def _table(path: str, name: str) -> Dataset:
    """A table with the columns it needs, ids as strings."""
    folder = Path(path).expanduser()
    files = sorted(map(str, (folder / name).rglob("*.parquet")))
    if (
        folder.is_dir() and not files and not (folder / "README.md").exists()
    ):  # which would name them
        raise LcoError(
            f"--seadoc={path} has no folder {name} with parquet files; it needs {', '.join(COLUMNS)}"
        )
    with explained(f"--seadoc={path}: {name} cannot be read", Exception):  # of many kinds
        table = (
            Dataset.from_parquet(files)
            if files
            else concatenate_datasets([*load_dataset(path, name).values()])
        )
    if missing := [column for column in COLUMNS[name] if column not in table.column_names]:
        raise LcoError(
            f"--seadoc={path}: {name} has no column {missing[0]!r}; it has {', '.join(table.column_names)}"
        )
    for column in (column for column in COLUMNS[name] if column.endswith("id")):
        table = table.cast_column(column, Value("string"))
    return table


def _languages(table: Dataset, where: str) -> dict[str, str]:
    """Id -> the language of its row, "" where nothing tells it. Raises for an id that is there twice."""
    languages: dict[str, str] = {}
    for name, said in zip(
        table["id"], table["language" if "language" in table.column_names else "id"], strict=True
    ):
        if name in languages:
            raise LcoError(f"{where} has the id {name!r} twice")
        languages[name] = LANGUAGES.get(re.split(r"[^a-z]", str(said).lower())[0], "")
    return languages
