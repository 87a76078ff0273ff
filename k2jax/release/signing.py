"""model.sig: a signature over the release by OpenSSF's model signing, with a key of the user's.

The library makes a manifest with the SHA-256 of every file, reading each again, and signs it. Anyone checks it with

    model_signing verify key DIR --signature DIR/model.sig --public_key KEY.pub
"""

from pathlib import Path
from typing import Any

from k2jax.errors import ConfigError
from k2jax.release.scratch import SIGNATURE

NEEDS = "pip install 'k2jax[release]'"


def signer(key: Path) -> Any:
    """A signer of the library with this private key; ConfigError where it is none that it takes."""
    try:
        from model_signing import signing
    except ImportError as error:
        raise ConfigError(f"--sign-key={key}: the library that signs is not there ({error}): {NEEDS}") from error
    try:
        return signing.Config().use_elliptic_key_signer(private_key=key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise ConfigError(
            f"--sign-key={key}: no key to sign with ({why}): expected a private key without a password in PEM, on the "
            f"curve P-256, P-384 or P-521: openssl ecparam -genkey -name prime256v1 -noout -out {key.name}"
        ) from error


def sign(signing: Any, folder: Path, signature: Path) -> None:
    """Signs all files of the folder but model.sig, and writes the signature."""
    from model_signing import hashing

    ignored = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    signing.set_hashing_config(ignored).sign(folder, signature)
