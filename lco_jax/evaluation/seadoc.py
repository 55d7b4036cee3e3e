"""SeaDoc as a task of mteb: pages of Southeast Asian documents, found by English queries.

Xiao et al. 2025 (arXiv 2510.11693): 5,091 pages in Lao, Thai, Vietnamese and Malay, 1,001 queries, one page answers each.
Published as three tables: corpus (id, image), query (id, text) and qrels (query-id, corpus-id, score).
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

COLUMNS = {"corpus": ("id", "image"), "query": ("id", "text"), "qrels": ("query-id", "corpus-id", "score")}
LANGUAGES = {"lao": ("lao", "lo"), "thai": ("thai", "tha", "th"), "vietnamese": ("vietnamese", "vie", "vi")}
LANGUAGES |= {"malay": ("malay", "msa", "zsm", "ms")}
logger = logging.getLogger(__name__)


class SeaDoc(AbsTaskRetrieval):
    """path: a folder with a folder of parquet files for each table, or a data set of the hub with a config for each.

    Scores hold ndcg_at_10 over all queries and ndcg_at_10_lao and so on: over the queries whose page is in that language,
    among all pages. A page's language is its column `language`, or else what its id begins with (lo_12, thai-3, …).
    """

    metadata = TaskMetadata(
        name="SeaDoc",
        description="Retrieve the page of a Southeast Asian document that answers an English query.",
        type="DocumentUnderstanding",
        category="t2i",
        modalities=["text", "image"],
        dataset={"path": "SeaDoc", "revision": "none"},
        reference="https://arxiv.org/abs/2510.11693",
        eval_splits=["test"],
        eval_langs=["eng-Latn", "lao-Laoo", "tha-Thai", "vie-Latn", "zsm-Latn"],
        main_score="ndcg_at_10",
        prompt=None,
    )

    def __init__(self, path: str):
        super().__init__()
        files = sorted(Path(path).expanduser().rglob("*.parquet"))
        revision = fingerprint((file.name, file.stat()) for file in files).split()[-1] if files else "hub"
        self.metadata = self.metadata.model_copy(update={"dataset": {"path": str(path), "revision": revision}})
        self.language_of: dict[str, str] = {}  # query -> its page's

    def load_data(self, **_: Any) -> None:
        """Read the three tables, and check that they belong together."""
        if self.data_loaded:
            return
        path = self.metadata.dataset["path"]
        tables = {name: _table(path, name) for name in COLUMNS}
        spoken = {name: _languages(tables[name], f"--seadoc={path}: {name}") for name in ("corpus", "query")}
        relevant: dict[str, dict[str, int]] = defaultdict(dict)
        for row, (query, page, score) in enumerate(zip(*(tables["qrels"][x] for x in COLUMNS["qrels"]), strict=True)):
            for table, column, value in (("query", "query-id", query), ("corpus", "corpus-id", page)):
                if value not in spoken[table]:
                    where = f"--seadoc={path}: qrels, row {row}"
                    raise LcoError(f"{where}: its {column} {value!r} is not in {table}; the tables do not match")
            relevant[query][page] = int(score)
        right = {query: [page for page in found if found[page] > 0] for query, found in relevant.items()}
        if not (asked := [row for row, query in enumerate(tables["query"]["id"]) if right.get(query)]):
            raise LcoError(f"--seadoc={path}: qrels has no score above 0, so no query has an answer")
        told = {query: spoken["corpus"][found[0]] or spoken["query"][query] for query, found in right.items() if found}
        self.language_of = {query: language for query, language in told.items() if language}
        if not self.language_of:
            logger.warning(
                "SeaDoc: neither a column `language` nor the ids tell languages; there is one score over all"
            )
        corpus, queries = (tables[name].select_columns(list(COLUMNS[name])) for name in ("corpus", "query"))
        data = {"corpus": corpus, "queries": queries.select(asked), "relevant_docs": dict(relevant), "top_ranked": None}
        self.dataset, self.data_loaded = {"default": {"test": data}}, True

    def task_specific_scores(self, scores: Mapping[str, Mapping[str, float]], *_: Any, **__: Any) -> dict[str, float]:
        """nDCG@10 by language."""
        found = defaultdict(list)
        for query, score in scores.items():
            if query in self.language_of:
                found[f"ndcg_at_10_{self.language_of[query]}"].append(score["ndcg_cut_10"])
        return {name: float(np.mean(found[name])) for name in sorted(found)}


def _table(path: str, name: str) -> Dataset:
    """A table with the columns it needs, ids as strings."""
    folder = Path(path).expanduser()
    files = sorted(map(str, (folder / name).rglob("*.parquet")))
    if folder.is_dir() and not files and not (folder / "README.md").exists():  # which would name the files
        raise LcoError(f"--seadoc={path} has no folder {name} with parquet files; it needs {', '.join(COLUMNS)}")
    with explained(f"--seadoc={path}: {name} cannot be read", Exception):  # the hub and its formats have many kinds
        table = Dataset.from_parquet(files) if files else concatenate_datasets([*load_dataset(path, name).values()])
    if missing := [column for column in COLUMNS[name] if column not in table.column_names]:
        raise LcoError(f"--seadoc={path}: {name} has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    for column in COLUMNS[name]:
        table = table.cast_column(column, Value("string")) if column.endswith("id") else table
    return table


def _languages(table: Dataset, where: str) -> dict[str, str]:
    """Id -> the language of its row, "" where nothing tells it. Raises for an id that is there twice."""
    known = {code: name for name, codes in LANGUAGES.items() for code in codes}
    words = table["language"] if "language" in table.column_names else table["id"]
    languages: dict[str, str] = {}
    for name, word in zip(table["id"], words, strict=True):
        if name in languages:
            raise LcoError(f"{where} has the id {name!r} twice")
        first = re.match(r"[a-z]+", str(word).lower())
        languages[name] = known.get(first[0], "") if first else ""
    return languages
