"""How the shapes and types in signatures are held during tests (`--jaxtyping-packages` in pyproject.toml)."""

from beartype import BeartypeConf, beartype

# As in static type checkers, an int is accepted where a float is required.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
