"""Check once whether the Hugging Face hub can be reached."""

import os
import sys
from functools import cache

TIMEOUT = 5.0  # seconds to wait for the hub's answer


@cache
def why_not() -> str | None:
    """Return why the Hugging Face hub can't be reached, or None if it answers.

    Makes one request, without retrying. If it fails, the libraries are set to offline mode and use their cache.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # of httpx or requests, depending on the version
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by `datasets` and by child processes
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} does not answer: {' '.join(str(error).split()) or type(error).__name__}"
    return None


def is_cached(repository: str, file: str = "config.json") -> bool:
    """Whether a file of a model's repository is in the Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, file), str)


def unreachable(field: str, name: str, instead: str) -> str:
    """Word the error for a name that is neither local nor reachable. `instead` says what may be given."""
    return (
        f"{field}: {name!r} can't be loaded: it is not in the Hugging Face cache, and the hub can't be reached "
        f"({why_not()}); give {instead}"
    )
