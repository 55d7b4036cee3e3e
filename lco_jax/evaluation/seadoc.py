"""SeaDoc as a task of mteb: pages in Lao, Thai, Vietnamese and Malay, and English queries.

Xiao et al. 2025 (arXiv 2510.11693): 5,091 pages and 1,001 queries, each answered by one page.
Published as three tables.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
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
    """Every query is asked of all pages.

    path: a folder that has parquet files in a folder for each of `COLUMNS`, or a hub id that has a
    config for each. Raises naming the table, row and id where tables are missing or do not match.

    Scores are ndcg_at_10 over all queries, and ndcg_at_10_lao and so on over the queries whose page
    is in that language. The language is the page's column `language`, else the beginning of its id
    (lo_12, thai-3), else the same of the query.
    """

    metadata = TaskMetadata(
        name="SeaDoc",
        description="Retrieve the page of a Southeast Asian document that answers a query.",
        type="DocumentUnderstanding",
        category="t2i",
        modalities=["text", "image"],
        dataset={"path": "SeaDoc", "revision": "hub"},
        reference="https://arxiv.org/abs/2510.11693",
        eval_splits=["test"],
        eval_langs=[
            "eng-Latn",
            "lao-Laoo",
            "tha-Thai",
            "vie-Latn",
            "zsm-Latn",
        ],
        main_score="ndcg_at_10",
    )

    def __init__(self, path: str):
        super().__init__()
        files = sorted(Path(path).expanduser().rglob("*.parquet"))
        revision = "hub"
        if files:
            revision = fingerprint((file.name, file.stat()) for file in files).split()[-1]
        dataset = {"path": path, "revision": revision}
        self.metadata = self.metadata.model_copy(update={"dataset": dataset})
        self.language_of: dict[str, str] = {}  # query -> its page's, of the queries with a page

    def load_data(self, **_: Any) -> None:
        """Read the tables, and check that they belong together."""
        path = self.metadata.dataset["path"]
        tables = {name: _table(path, name) for name in COLUMNS}
        relevant = self._judgements(tables)
        if not any(self.language_of.values()):
            logger.warning(
                "SeaDoc: neither a column `language` nor ids name languages; one score is over all"
            )
        corpus = tables["corpus"].select_columns(list(COLUMNS["corpus"]))
        queries = tables["query"].select_columns(list(COLUMNS["query"]))
        asked = [row for row, query in enumerate(queries["id"]) if query in self.language_of]
        split = {
            "corpus": corpus,
            "queries": queries.select(asked),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True

    def _judgements(self, tables: Mapping[str, Dataset]) -> dict[str, dict[str, int]]:
        """Query -> {page: score} of qrels; fills `language_of`."""
        where = f"--seadoc={self.metadata.dataset['path']}"
        languages = {
            name: _languages(tables[name], f"{where}: {name}") for name in ("corpus", "query")
        }
        relevant: dict[str, dict[str, int]] = defaultdict(dict)
        columns = [tables["qrels"][name] for name in COLUMNS["qrels"]]
        for row, (query, page, score) in enumerate(zip(*columns, strict=True)):
            for table, value in (
                ("query", query),
                ("corpus", page),
            ):
                if value not in languages[table]:
                    raise LcoError(
                        f"{where}: qrels, row {row}: its {table}-id {value!r} is not in {table}"
                    )
            relevant[query][page] = int(score)
            if score > 0:
                self.language_of[query] = languages["corpus"][page] or languages["query"][query]
        if not self.language_of:
            raise LcoError(f"{where}: qrels has no score above 0, so no query has an answer")
        return dict(relevant)

    def task_specific_scores(
        self,
        scores: Mapping[str, Mapping[str, float]],
        *_: Any,
        **__: Any,
    ) -> dict[str, float]:
        """nDCG@10 by language."""
        found = defaultdict(list)
        for query, score in scores.items():
            if language := self.language_of[query]:
                found[f"ndcg_at_10_{language}"].append(score["ndcg_cut_10"])
        return {name: float(np.mean(found[name])) for name in sorted(found)}


def _table(path: str, name: str) -> Dataset:
    """A table with the columns that it needs; ids are strings."""
    where = f"--seadoc={path}"
    folder = Path(path).expanduser()
    files = [str(file) for file in sorted((folder / name).rglob("*.parquet"))]
    # a README.md says where the files of each config are
    if folder.is_dir() and not files and not (folder / "README.md").exists():
        needed = ", ".join(COLUMNS)
        raise LcoError(f"{where} has no folder {name} with parquet files; it needs {needed}")
    raised = (
        OSError,
        ValueError,
        DatasetsError,
        pyarrow.ArrowException,
    )
    with explained(f"{where}: {name} cannot be read", *raised):
        if files:
            table = Dataset.from_parquet(files)
        else:
            table = concatenate_datasets(list(load_dataset(path, name).values()))
    for column in COLUMNS[name]:
        if column not in table.column_names:
            given = ", ".join(table.column_names)
            raise LcoError(f"{where}: {name} has no column {column!r}; it has {given}")
        if column.endswith("id"):
            table = table.cast_column(column, Value("string"))
    return table


def _languages(table: Dataset, where: str) -> dict[str, str]:
    """Id -> the language of its row, "" if unknown. Raises for an id that occurs twice."""
    column = "language" if "language" in table.column_names else "id"
    languages: dict[str, str] = {}
    for name, text in zip(table["id"], table[column], strict=True):
        if name in languages:
            raise LcoError(f"{where} has the id {name!r} twice")
        code = re.split(r"[^a-z]", str(text).lower())[0]
        languages[name] = LANGUAGES.get(code, "")
    return languages
