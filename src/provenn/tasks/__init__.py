"""One module a kind of work: data in, batch, loss, metric, picture, prediction."""
