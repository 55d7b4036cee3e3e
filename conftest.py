"""Eight CPU devices for every test, programs that compile fast, and one compilation cache per
session; before jax is imported.
"""

import atexit
import os
import shutil
import tempfile

# Programs then compile in a fraction of the time, and their numbers differ by rounding. The
# README's blocks have XLA's defaults, as users do; LCO_JAX_TEST_XLA=default gives them to every
# test.
FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
if os.environ.get("LCO_JAX_TEST_XLA") == "default":
    FAST = ""
os.environ["XLA_FLAGS"] = f"{FAST} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp(prefix="lco-jax-compiled-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
