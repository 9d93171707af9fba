"""The targets of a LoraConfig in a tree, by PEFT's rules."""

from jlora.lora.targets.find import (
    across_runs,
    find_targets,
    match_table,
    replaced_leaves,
    token_rows,
)
from jlora.lora.targets.names import (
    listed_names,
    names_of_all,
    with_listed_targets,
    with_module_settings,
)
from jlora.lora.targets.rules import (
    is_replaced,
    is_saved,
    is_target,
    is_target_parameter,
    parameter_rank_of,
    rank_of,
    scaling_of,
    token_indices,
)
from jlora.lora.targets.target import Target

__all__ = [
    "Target",
    "across_runs",
    "find_targets",
    "is_replaced",
    "is_saved",
    "is_target",
    "is_target_parameter",
    "listed_names",
    "match_table",
    "names_of_all",
    "parameter_rank_of",
    "rank_of",
    "replaced_leaves",
    "scaling_of",
    "token_indices",
    "token_rows",
    "with_listed_targets",
    "with_module_settings",
]
