"""Users and tokens that may use the service."""

from __future__ import annotations

import base64
import hashlib
import stat
from dataclasses import dataclass, field
from pathlib import Path

import bcrypt

from raylift.datasets.errors import ConfigError

MIN_TOKEN_LENGTH = 32


@dataclass(frozen=True)
class Credentials:
    """Password hashes by user, and digests of tokens."""

    passwords: dict[str, bytes] = field(default_factory=dict)
    tokens: frozenset[bytes] = frozenset()

    @property
    def challenge(self) -> str:
        """The schemes that the service accepts, as in the header WWW-Authenticate."""
        return 'Basic realm="raylift", charset="UTF-8"' if self.passwords else 'Bearer realm="raylift"'

    def accept_token(self, authorization: str) -> bool:
        """Whether a header Authorization has a token."""
        scheme, _, value = authorization.partition(" ")
        return scheme.lower() == "bearer" and _digest(value.strip()) in self.tokens

    @staticmethod
    def user(authorization: str) -> str:
        """Whose an accepted header Authorization is: the name of a user, or the digest of a token."""
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "bearer":
            return f"token {_digest(value.strip()).hex()}"
        return f"user {base64.b64decode(value).decode().partition(':')[0]}"

    def accept_password(self, authorization: str) -> bool:
        """Whether a header Authorization has a user and a password; as slow for unknown users as for known ones."""
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() != "basic" or not self.passwords:
            return False
        try:
            user, _, password = base64.b64decode(value, validate=True).decode().partition(":")
        except ValueError:
            return False
        # bcrypt refuses longer passwords.
        if len(password.encode()) > 72:
            return False
        hashed = self.passwords.get(user, next(iter(self.passwords.values())))
        return bcrypt.checkpw(password.encode(), hashed) and user in self.passwords


def read(auth_file: Path | None, token_file: Path | None) -> Credentials | None:
    """The credentials of both files; None without a file.

    Args:
        auth_file: lines `user:hash` with hashes of bcrypt, as `htpasswd -B` writes them.
        token_file: a token of at least 32 characters in each line.

    Raises:
        ConfigError: a file cannot be read, is empty, is readable by other users, or has an invalid line.
    """
    if auth_file is None and token_file is None:
        return None
    passwords = {}
    for number, line in enumerate(_lines(auth_file), start=1):
        user, _, hashed = line.partition(":")
        try:
            bcrypt.checkpw(b"", hashed.encode())
        except ValueError as error:
            raise ConfigError(
                f"{auth_file}: line {number} is not a user and a hash of bcrypt: use htpasswd -B"
            ) from error
        passwords[user] = hashed.encode()
    tokens = _lines(token_file)
    for number, token in enumerate(tokens, start=1):
        if len(token) < MIN_TOKEN_LENGTH:
            raise ConfigError(
                f"{token_file}: the token in line {number} has under {MIN_TOKEN_LENGTH} characters: "
                "use openssl rand -hex 32"
            )
    return Credentials(passwords, frozenset(map(_digest, tokens)))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        # Secrets of Kubernetes with an fsGroup are readable by the group.
        if path.stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise ConfigError(
                f"{path} is readable by all users, or writable by its group: run chmod 600 {path}, or 640 for its group"
            )
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ConfigError(f"{path} has no line: write a user or a token into it")
    return lines
