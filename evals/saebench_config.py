"""The settings that SAEBench 0.6.0's result files have, by its names, one class an eval.

SAEBench reads a setting that a file leaves out as its own default. None of these has one: whoever writes a file says all of
them, as they were. Where an eval has nothing of the kind, a number is 0.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class CoreConfig:
    model_name: str
    llm_dtype: str
    batch_size_prompts: int
    n_eval_reconstruction_batches: int
    n_eval_sparsity_variance_batches: int
    dataset: str
    context_size: int
    compute_kl: bool
    compute_ce_loss: bool
    compute_l2_norms: bool
    compute_sparsity_metrics: bool
    compute_variance_metrics: bool
    compute_featurewise_density_statistics: bool
    compute_featurewise_weight_based_metrics: bool
    exclude_special_tokens_from_reconstruction: bool
    verbose: bool


@dataclass(frozen=True)
class SparseProbingConfig:
    model_name: str
    llm_dtype: str
    llm_batch_size: int
    random_seed: int
    dataset_names: list[str]
    probe_train_set_size: int
    probe_test_set_size: int
    context_length: int
    sae_batch_size: int
    k_values: list[int]
    lower_vram_usage: bool


@dataclass(frozen=True)
class UnlearningConfig:
    model_name: str
    llm_dtype: str
    llm_batch_size: int
    random_seed: int
    dataset_names: list[str]
    intervention_method: str
    retain_thresholds: list[float]
    n_features_list: list[int]
    multipliers: list[int]
    dataset_size: int
    seq_len: int
    n_batch_loss_added: int
    target_metric: str
    save_metrics: bool


@dataclass(frozen=True)
class ScrAndTppConfig:
    model_name: str
    llm_dtype: str
    llm_batch_size: int
    random_seed: int
    dataset_names: list[str]
    perform_scr: bool
    early_stopping_patience: int
    train_set_size: int
    test_set_size: int
    context_length: int
    probe_train_batch_size: int
    probe_test_batch_size: int
    probe_epochs: int
    probe_lr: float
    probe_l1_penalty: float
    sae_batch_size: int
    lower_vram_usage: bool
    n_values: list[int]
    column1_vals_lookup: dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class AbsorptionConfig:
    model_name: str
    llm_dtype: str
    llm_batch_size: int
    random_seed: int
    f1_jump_threshold: float
    max_k_value: int
    prompt_template: str
    prompt_token_pos: int
    k_sparse_probe_l1_decay: float
    k_sparse_probe_batch_size: int
    k_sparse_probe_num_epochs: int
    min_GT_probe_f1: float
    min_feats_for_eval: int
    eval_k_sparse_probe_batch_size: int
    precalc_k_sparse_probe_sae_acts: bool


EvalConfig = CoreConfig | SparseProbingConfig | UnlearningConfig | ScrAndTppConfig | AbsorptionConfig
