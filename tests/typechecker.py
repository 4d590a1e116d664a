"""How the shapes and types in signatures are held during tests (`--jaxtyping-packages` in pyproject.toml)."""

from beartype import BeartypeConf, beartype

# As type checkers have it, an int will do where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
