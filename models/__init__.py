"""Models and networks by the name an option file uses; imported when asked for."""

MODELS = {
    "plain": "models.model_plain:ModelPlain",
    "vrt": "models.model_vrt:ModelVRT",
}

NETWORKS = {
    "vrt": "models.network_vrt:VRT",
    "spynet": "models.network_spynet:SpyNet",
}
