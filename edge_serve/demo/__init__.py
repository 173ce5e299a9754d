"""The demo: two small trained models, test data that training never saw, and a run of the whole product on them."""
