"""What a report calls the evals and their figures, and which figures are main scores."""

#: eval -> the paths of its main scores
SCORES = {
    "core": "explained_variance ce_recovered kl_recovered l0 dead_fraction",
    "sparse_probing": "top_1 top_5",
    "sae_probes": "auc.16 auc.1",
    "positions": "specialization fidelity.snr.worst order_probing.mean_pooled order_probing.last_token",
    "ground_truth": "recovered mean_f1 mean_top_5",
    "unlearning": "score retained",
    "clusters": "stability.adjusted_rand",
    "absorption": "mean_main_f1 mean_absorption",
    "mdl": "bits_per_token fvu",
    "meta_structure": "meta_explained_variance",
    "ravel": "score cause isolation",
    "tpp": "score",
    "scr": "score",
    "autointerp": "score balanced",
}
# scores that are not better when larger
NOT_BETTER = (
    "l0", "dead_fraction", "retained", "mean_absorption", "bits_per_token", "fvu", "meta_explained_variance", "cause",
    "isolation",
)  # fmt: skip

UNRELIABLE = "Don't choose between dictionaries by this score: an audit found it unreliable (arXiv 2605.18229)."

#: eval -> caption of its section
ASKS = {
    "core": "Reconstruction quality, sparsity, and the effect of the reconstruction on the model's predictions.",
    "sparse_probing": "Test accuracy of probes that separate classes of text by k latents; 0.5 is chance.",
    "sae_probes": "Test AUC of probes on k latents of a text's last token, on the data sets of sae-probes; 0.5 is chance.",
    "positions": "Specialization of latents for positions, reconstruction late in a row, and probes of word order.",
    "ground_truth": "Known variables of the embedded language: what a few latents write of them, and how one detects them.",
    "unlearning": "Answers about one subject that can be suppressed while 99% of the others stay right.",
    "tpp": "Accuracy that one class loses when its n latents are ablated, minus the mean loss of the others. "
    + UNRELIABLE,
    "scr": "Share of a spurious correlation removed by ablating n latents: 0 none, 1 all of it. " + UNRELIABLE,
    "clusters": "Latents clustered by the positions at which they are active, and the stability of the clusters.",
    "absorption": "Words missed by their first letter's latents. Also low if no latent represents a letter.",
    "mdl": "Bits per token that the rounded codes need. Compare at equal FVU only.",
    "meta_structure": "Share of the decoder rows' variance that a small dictionary trained on them explains.",
    "ravel": "Attributes of entities changed by exchanging latents, while other attributes stay; 0.5 without a change.",
    "autointerp": "Share of examples for which a judge tells from its own explanation whether the latent fires.",
}

#: path of a figure, or its last part -> heading, if different
LABELS = {
    "l0": "L0", "l1": "L1", "mse": "MSE", "f1": "F1", "ce": "CE (nats)", "kl": "KL (nats)",
    "ce_recovered": "CE recovered", "ce_recovered_over_mean": "CE recovered over mean ablation",
    "kl_recovered": "KL recovered", "cosine": "cosine of x and x_hat", "l2_ratio": "norm of x_hat / norm of x",
    "dead_fraction": "dead latents (share)",
    "saebench.explained_variance": "explained variance, SAEBench's definition",
    "saebench.explained_variance_legacy": "explained variance, SAEBench's legacy definition", "rows": "held-out rows",
    "ce_tokens": "tokens for CE and KL", "train_rows": "training rows", "test_accuracy": "all",
    "top_1_error": "error of top 1", "mutual_information": "mutual information (nats)",
    "positional_share": "share above 0.05 nats", "spearman_share": "share with rank correlation above 0.4",
    "alive": "latents that fire", "snr.mean": "SNR (dB), mean of bins", "snr.worst": "SNR (dB), worst bin",
    "ce_recovered.mean": "CE recovered, mean of bins",
    "ce_recovered.worst": "CE recovered, worst bin", "fidelity.snr.worst": "fidelity: SNR (dB), worst bin",
    "order_probing.mean_pooled": "order probing: mean pooled", "order_probing.last_token": "order probing: last token",
    "bow": "bag of words", "lm": "LM activations", "test": "test texts",
    "recovered": "recovered by 5 latents", "detected": "detected (share with F1 of 0.8)", "mean_f1": "mean F1",
    "mean_top_5": "mean accuracy of a probe on 5", "questions.forget": "questions to forget",
    "questions.retain": "questions to retain", "activation_norm": "mean norm of the activations",
    "loss_increase": "loss added (nats per token to retain)", "reason": "why it scores 0", "total_metric": "total",
    "intended_diff_only": "lost by the class", "unintended_diff_only": "lost by the others",
    "within": "mean distance within", "between": "mean distance between",
    "stability.adjusted_rand": "stability (adjusted Rand index)", "stability.spread": "its standard deviation",
    "mean_absorption_fraction": "mean fraction", "mean_split": "main latents of a letter",
    "mean_main_f1": "mean F1 of main latents", "probe_f1": "probe's F1", "main": "main latents", "main_f1": "their F1",
    "absorption_fraction": "fraction", "auc.1": "AUC, 1 latent", "auc.16": "AUC, 16 latents",
    "balanced": "score, active and inactive examples equally weighted",
    "cause": "cause: answers that become the source's", "isolation": "isolation: answers about others that stay",
    "fvu": "FVU", "fvu_rounded": "FVU, rounded", "active_bits": "bits: which latents", "value_bits": "bits: how strong",
    "uniform_bits": "bits per token, values in uniform code", "bits_per_dimension": "bits per token and dimension",
    "width": "width of a bin", "bins": "bins, most of a latent", "num_bins": "bins of a latent",
    "mse_loss": "root mean square error / D",
    "none": "score of always answering None", "named": "named as active", "unparsable": "answers that can't be read",
    "meta_explained_variance": "explained variance of decoder rows", "meta_latents": "meta-latents",
    "train_explained_variance": "the same on training rows", "held_out": "held-out rows",
}  # fmt: skip


def label(path: str) -> str:
    key = path.rpartition(".")[2]
    return LABELS.get(path, LABELS.get(key, key.replace("_", " ")))
