"""Applications of Keras 3, on the JAX backend."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras

from real_models.model import Model, model, normal

applications = keras.applications


@model("keras/MobileNet", cls=applications.MobileNet)
@model("keras/MobileNetV2", cls=applications.MobileNetV2)
@model("keras/MobileNetV3Small", cls=applications.MobileNetV3Small)
@model("keras/ResNet50", cls=applications.ResNet50)
@model("keras/ResNet50V2", cls=applications.ResNet50V2)
@model("keras/EfficientNetB0", cls=applications.EfficientNetB0)
@model("keras/ConvNeXtTiny", cls=applications.ConvNeXtTiny)
@model("keras/DenseNet121", cls=applications.DenseNet121)
@model("keras/NASNetMobile", cls=applications.NASNetMobile)
@model("keras/EfficientNetV2B0", cls=applications.EfficientNetV2B0)
@model("keras/Xception", cls=applications.Xception, size=71)
@model("keras/VGG16", cls=applications.VGG16)
@model("keras/InceptionV3", cls=applications.InceptionV3, size=75)
def application(cls, size=32) -> Model:
    keras.utils.set_random_seed(0)
    keras.config.set_floatx("float64")
    module = cls(
        weights=None,
        input_shape=(size, size, 3),
        classes=10,
        classifier_activation=None,
    )
    names = [variable.path for variable in module.trainable_variables]
    state = [variable.value for variable in module.non_trainable_variables]

    def apply_fn(params, x):
        return module.stateless_call([params[name] for name in names], state, x, training=False)[0]

    params = {variable.path: variable.value for variable in module.trainable_variables}
    return Model(apply_fn, params, (normal(1, size, size, 3),))
