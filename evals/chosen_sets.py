"""Which of the sets that `--set` gives an eval reads."""

from collections.abc import Sequence

from .labelled import EMBEDDED
from .paired_sets import has_pairs
from .probe_sets import is_probe_set


def sets_read(name: str, sets: Sequence[str]) -> list[str]:
    """The sets that the eval `name` reads: sae_probes those of its package, and others the labelled texts. SCR and TPP leave
    out labels of the embedded language, and SCR also sets without an attribute."""
    if name == "sae_probes":
        return [source for source in sets if is_probe_set(source)]
    texts = [source for source in sets if not is_probe_set(source)]
    if name == "sparse_probing":
        return texts
    texts = [source for source in texts if source not in EMBEDDED] if name in ("tpp", "scr") else []
    return [source for source in texts if has_pairs(source)] if name == "scr" else texts
