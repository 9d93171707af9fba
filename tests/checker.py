"""The runtime type checker that conftest puts on jlora's functions: beartype, with int as float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
