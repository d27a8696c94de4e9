"""What the logs are about and what they asked of runs beside each other; what scores mean; what their figures show."""

from typing import NamedTuple

LOG_TITLES = {
    "A": "structured positional masking",
    "B": "structured positional masking, second series",
    "C": "position-aware SAEs for sequences",
    "D": "multi-scale temporal SAEs for unlearning",
    "E": "self-aligning adversarial SAEs",
}
POSITIONAL = ("A", "B", "C")  # the logs that are about position


class Question(NamedTuple):
    """What is to be compared, and the runs that differ in it: (run, the one it is set against). `strict`: it is about how
    strict masks are, which conditions of a campaign may set, too."""

    about: str
    pairs: tuple[tuple[str, str], ...]
    strict: bool = False


STRICT = {
    ("soft", "hard"): "soft masks rather than hard",
    ("annealed", "hard"): "annealed masks rather than hard",
    ("annealed", "soft"): "annealed masks rather than soft",
}
QUESTIONS = (
    Question(STRICT["soft", "hard"], (("A2", "A1"), ("B2", "B1")), True),
    Question(STRICT["annealed", "soft"], (("C2", "C1"),), True),
    Question(STRICT["annealed", "hard"], (), True),
    Question("a mask that comes in by and by rather than at once", (("B6", "B2"),)),
    Question("more L1 on soft masks", (("A3", "A2"),)),
    Question("reconstruction weighted by position (A4 has more L1, too)", (("A4", "A2"), ("C5", "C2"))),
    Question("sparsity weighted by position as well", (("C6", "C5"),)),
    Question("a global half beside routed position groups", (("A7", "A6"),)),
    Question("L1 before the mask rather than after", (("B3", "B2"),)),
    Question("clipping and a tenth of the learning rate", (("B4", "B3"),)),
    Question("layer norm (with clipping) before the mask", (("B5", "B3"),)),
    Question("orthogonal range encoders rather than plain ones", (("B8", "B7"),)),
    Question("a curriculum for the adapters", (("B10", "B9"),)),
    Question("dilated convolutions with separation rather than without", (("D2", "D1"),)),
    Question("an adversary on top of the dynamic margin", (("E2", "E1"),)),
    Question("a stronger adversary, with spurious latents kept apart", (("E3", "E2"),)),
)


class ScoreMeaning(NamedTuple):
    """A score's name at the beginning of a sentence, and what it is."""

    name: str
    what: str

    @property
    def within(self) -> str:
        """The name within a sentence."""
        return self.name if self.name[:2].isupper() else self.name[0].lower() + self.name[1:]


#: by the names of campaign.json, in the order of the table
MEANINGS = {
    "loss": ScoreMeaning("Loss", "the training loss of the run's own objective, at its last report"),
    "fvu_last": ScoreMeaning("FVU", "share of variance unexplained at the end of training, on rows of text held out"),
    "l0": ScoreMeaning("L0", "latents above zero on a token"),
    "explained_variance": ScoreMeaning("Explained variance", "1 - FVU, on held-out text"),
    "ce_recovered": ScoreMeaning(
        "CE recovered", "of what the model loses in cross-entropy with zeros at the hook, the share won back"
    ),
    "dead_fraction": ScoreMeaning("Dead latents", "share of latents that fire on no token measured; fewer is better"),
    "probing_1": ScoreMeaning("Sparse probing top 1", "accuracy of probes on the best latent; 0.5 is chance"),
    "probing_5": ScoreMeaning("Sparse probing top 5", "accuracy of probes on the 5 best latents; 0.5 is chance"),
    "order_pooled": ScoreMeaning(
        "Order probing mean-pooled",
        "telling two texts of the same words apart by their order, from latents in the mean over tokens",
    ),
    "order_last": ScoreMeaning(
        "Order probing last token",
        "telling two texts of the same words apart by their order, from the last token's latents",
    ),
    "unlearning": ScoreMeaning("Unlearning", "share of a subject's answers turned while 99% of the others are kept"),
    "scr": ScoreMeaning("SCR", "share of a spurious correlation that goes when the latents for it are ablated"),
    "tpp": ScoreMeaning("TPP", "what a class loses by its latents' ablation, less what the others lose"),
    "specialization": ScoreMeaning(
        "Specialization", "how much of whether a latent is active position decides; neither more nor less is better"
    ),
    "retention": ScoreMeaning(
        "Retention", "of the plain ReLU baseline's specialization, the share that matching latents keep"
    ),
    "fidelity": ScoreMeaning("Fidelity", "how much of the activations' positional profile reconstruction keeps"),
}

OVER_TRAINING = "Error over training, a line a run: FVU, since losses of different objectives can't be compared."
#: by the file's name without its end: what a figure shows, and the score that claims may point at it for
CAPTIONS: dict[str, tuple[str, str | None]] = {
    "overview": ("Explained variance of all dictionaries beside their random controls.", "explained_variance"),
    "conditions": ("Error of every run in every condition: against sparsity, unless that is the same for all.", None),
    "unlearning_scores": ("Unlearning score of each run of the log, beside its random control.", "unlearning"),
    "loss_curves": (OVER_TRAINING, None),
    "final_metrics": ("What each run leaves unexplained at the end.", "explained_variance"),
    "training_progression": ("How many steps each run completed, and its error at the end.", None),
    "hyperparameters": ("Learning rate and L1 coefficient of each run.", None),
    "position_analysis": ("Squared error by position over training and at its end, and the weights of positions.", None),
    "position_weights": ("Loss weights of positions over training, and beside how hard positions are.", None),
    "sparsity_analysis": ("Active latents by position over training and at its end, and latents by position.", None),
    "temporal_clustering": ("Latents in the order of a tree of where in a row they are active.", None),
    "cluster_patterns": ("Of each cluster of latents the mean profile, likeness within, and specialization.", None),
    "comparative_analysis": ("The log's runs beside each other: error, sparsity, and both by position.", None),
    "training_curves": (OVER_TRAINING, None),
    "feature_statistics": ("How large each run's dictionary is, and how many of its latents are alive.", "dead_fraction"),
}  # fmt: skip
