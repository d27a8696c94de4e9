import pytest
from temposae.engine.testbed.language import Language


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents of 1 to 400 tokens, longer than a row and shorter."""
    language = Language()
    return [
        " ".join(" ".join(language.document(3 * i + j).text for j in range(3)).split()[: 1 + 17 * i % 397])
        for i in range(300)
    ]
