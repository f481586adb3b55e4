"""The real services that these tests run on."""

import warnings

from tests.services_real import apache_home, apache_kafka, kafka, postgres  # noqa: F401

with warnings.catch_warnings():  # kafka-python reads its schemas by a function that Python 3.11 wants replaced
    warnings.simplefilter("ignore", DeprecationWarning)
    import loop.log.kafka  # noqa: F401
