"""What a client is told when its request has no answer, in the words of what it asked."""

import uuid
from typing import Any

from starlette.responses import JSONResponse, Response

KINDS = {  # what OpenAI calls them
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refused(Exception):
    """A request that is not answered. param: what of it is to blame, such as input[3]."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after is None else {"retry-after": str(retry_after)}

    def answer(self, path: str) -> Response:
        """In OpenAI's shape below /v1, in Cohere's below /v2, else in that of the search page."""
        body: dict[str, Any] = {"error": self.message}
        if path.startswith("/v1/"):
            body = _in_openais(self)
        elif path.startswith("/v2/"):
            body = _in_coheres(self)
        return JSONResponse(body, self.status, self.headers)


def _in_openais(refused: Refused) -> dict[str, Any]:
    kind = KINDS.get(refused.status)
    if kind is None:
        kind = "invalid_request_error" if refused.status < 500 else "server_error"
    error = {
        "message": refused.message,
        "type": kind,
        "param": refused.param,
        "code": refused.code,
    }
    return {"error": error}


def _in_coheres(refused: Refused) -> dict[str, Any]:
    return {"id": str(uuid.uuid4()), "message": refused.message}
