"""The figures of the notebooks: one function each, which returns a matplotlib Figure."""

from itae_utils.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, {
    "style": ["ReportFigure", "check_figure_path", "save", "save_as", "styled", "use_format"],
    "names": ["describe_numbered", "label_names"],
    "discovery": ["artifact_positions", "attention_examples", "attention_shares", "hidden_norms", "inspection"],
    "statistics": ["agreement", "output_norms", "statistic_distributions", "value_norms"],
    "scores": ["ablation_curves", "ablation_heatmaps", "class_gains", "cluster_sheet", "confusions", "embeddings",
               "harms", "score_overview"],
    "comparison": ["published_and_measured"],
    "remedies": ["remedy_maps", "score_against_cost"],
})
