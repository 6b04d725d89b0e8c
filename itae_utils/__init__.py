"""See, attenuate and measure attention artifacts of Vision Transformers at inference time (ITAE, arXiv 2410.04801)."""

from itae_utils.lazy import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(__name__, {
    "errors": ["ItaeError"],
    "method.setting": ["ITAE"],
    "method.register_setting": ["TestTimeRegisters"],
    "method.registers": ["apply_registers"],
    "method.artifacts": ["precision_recall"],
    "method.statistics": ["qkv_norms", "token_norms"],
    "method.thresholds": ["fit_threshold"],
    "method.attention": ["attenuate", "attention_map"],
    "data.datasets": ["load_dataset"],
    "models.backbones": ["Backbone", "load_backbone"],
    "extraction.batches": ["image_batches"],
    "extraction.fitting": ["fit_setting", "fit_thresholds"],
    "extraction.neurons": ["find_register_neurons"],
    "extraction.observation": ["observe"],
    "extraction.features": ["extract_features"],
    "figures.explorer.widget": ["explore"],
    "analysis.kmeans": ["cluster", "cluster_parts"],
    "analysis.metrics": ["agreement", "evaluate_clustering", "paired_bootstrap"],
})
