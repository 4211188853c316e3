"""The toy world and the tiny pretrained base that the tests and the demo train on."""
