"""The peer of `serving`: sentence-transformers in the plainest FastAPI application.

python -m benchmarks.serving_peer FOLDER PORT
"""

import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.peer import import_torchvision


class Request(BaseModel):
    """What a client sends."""

    input: str


def app_of(folder: str) -> FastAPI:
    """An application that answers as OpenAI does."""
    import_torchvision()
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder)
    model.encode("a first text")
    app = FastAPI()

    @app.post("/v1/embeddings")
    def embeddings(request: Request) -> dict:
        vector = model.encode(request.input).tolist()
        return {"data": [{"index": 0, "object": "embedding", "embedding": vector}]}

    @app.get("/health")
    def health() -> str:
        return "well"

    return app


if __name__ == "__main__":
    uvicorn.run(app_of(sys.argv[1]), port=int(sys.argv[2]), log_level="error")
