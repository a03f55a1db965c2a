"""Every policy: one file each, registered on import. A new file here is found by itself; a broken one is left out."""
import importlib
import logging
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    try:
        importlib.import_module(f"{__name__}.{_module.name}")
    except Exception as error:
        logging.getLogger(__name__).warning(
            "%s/%s.py cannot be imported, so its policy is not there: %s: %s", __path__[0], _module.name,
            type(error).__name__, error,
        )
