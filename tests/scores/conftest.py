from tests.train.conftest import folder as folder
