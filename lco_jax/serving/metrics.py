"""What /metrics tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
INPUTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counts and times of a server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        at = {"registry": self.registry}
        self.requests = Counter(
            "lco_requests", "Requests that were answered", ["path", "status"], **at
        )
        self.seconds = Histogram(
            "lco_request_seconds", "From a request to its answer", ["path"], buckets=SECONDS, **at
        )
        self.inputs = Counter("lco_inputs", "Inputs that were accepted", ["lane"], **at)
        self.tokens = Counter("lco_tokens", "Tokens of answered requests", **at)
        self.waiting = Gauge("lco_waiting_inputs", "Inputs on their way", ["lane"], **at)
        self.programs = Gauge("lco_decoder_programs", "Programs that were compiled", **at)
        self._pass_inputs = Histogram(
            "lco_pass_inputs", "Inputs of a forward pass", ["lane"], buckets=INPUTS, **at
        )
        self._pass_seconds = Histogram(
            "lco_pass_seconds", "Seconds of a forward pass", ["lane"], buckets=SECONDS, **at
        )

    def passed(self, lane: str, inputs: int, seconds: float) -> None:
        """A forward pass."""
        self._pass_inputs.labels(lane).observe(inputs)
        self._pass_seconds.labels(lane).observe(seconds)

    def text(self) -> bytes:
        """All of them, in Prometheus' form."""
        return generate_latest(self.registry)
