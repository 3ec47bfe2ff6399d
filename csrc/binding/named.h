// Functions and groups whose arguments are given by name, so that two addresses that change places are refused and not
// written to.
//
// pybind11 has keywords too, and looks each of them up among all that are given: 3 us for the thirty of a layer, where
// all of a layer's Python takes 50. Here the names of a call are compared with those of the function by their
// addresses: Python keeps one string for all names that are equal in its code, and a caller usually has them in the
// order of the function. And Python itself makes a dictionary of more than fourteen names, which costs a microsecond or
// more: what many calls have in common is a group, a call of its own.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace ela::binding {

// Some arguments by place, all others by name; none may be left out.
class Names {
 public:
  // "plan, *, scale, x": those before the star are given by their place.
  Names(const char* function, const std::string& signature)
      : function_(function), doc_(function_ + "(" + signature + ")\n--\n\n") {
    bool by_name = false;
    for (size_t begin = 0, end = 0; end != std::string::npos; begin = end + 2) {
      end = signature.find(", ", begin);
      const std::string word = signature.substr(begin, end == std::string::npos ? end : end - begin);
      if (word == "*") {
        by_name = true;
      } else if (by_name) {
        names_.push_back(PyUnicode_InternFromString(word.c_str()));
        all_ += (all_.empty() ? "" : ", ") + word;
      } else {
        ++places_;
      }
      if (word != "*") words_.push_back(word);
    }
  }

  const char* function() const { return function_.c_str(); }
  const char* doc() const { return doc_.c_str(); }
  size_t size() const { return words_.size(); }
  const std::string& name(size_t i) const { return words_[i]; }

  // Calls body(arguments) with all arguments in the order of the signature, or returns null with an error set.
  // `given` are those by place, then those by name, whose names are in the tuple `keywords`.
  template <class Body>
  PyObject* ordered(PyObject* const* given, size_t count, PyObject* keywords, const Body& body) const {
    const size_t named = keywords == nullptr ? 0 : static_cast<size_t>(PyTuple_GET_SIZE(keywords));
    if (count != places_) {
      return PyErr_Format(PyExc_TypeError, "%s: got %zu arguments by place; allowed is %zu: give by name each of %s",
                          function(), count, places_, all_.c_str());
    }
    bool in_order = named == names_.size();
    for (size_t i = 0; in_order && i < named; ++i) in_order = PyTuple_GET_ITEM(keywords, i) == names_[i];
    if (in_order) return body(given);

    std::vector<PyObject*> arguments(given, given + count);
    arguments.resize(size(), nullptr);
    for (size_t i = 0; i < named; ++i) {
      PyObject* name = PyTuple_GET_ITEM(keywords, i);
      size_t place = 0;
      while (place < names_.size() && PyUnicode_Compare(name, names_[place]) != 0) ++place;
      if (place == names_.size()) {
        return PyErr_Format(PyExc_TypeError, "%s: got %R; allowed is %s", function(), name, all_.c_str());
      }
      arguments[count + place] = given[count + i];
    }
    for (size_t i = 0; i < names_.size(); ++i) {
      if (arguments[count + i] == nullptr) {
        return PyErr_Format(PyExc_TypeError, "%s: got no %R; give each of %s", function(), names_[i], all_.c_str());
      }
    }
    return body(arguments.data());
  }

 private:
  std::string function_, doc_, all_;
  size_t places_ = 0;
  std::vector<std::string> words_;
  std::vector<PyObject*> names_;  // those after the star
};

// Adds to a module what calls `Callable::call(given, count, keywords)`. It lives as long as the process, as the module
// does.
template <class Callable>
void add_callable(pybind11::module_& module, Callable* callable) {
  constexpr auto entry = [](PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* keywords) {
    const auto* called = static_cast<const Callable*>(PyCapsule_GetPointer(self, nullptr));
    return called->call(given, static_cast<size_t>(count), keywords);
  };
  PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*) = entry;
  callable->method = {callable->names.function(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
                      METH_FASTCALL | METH_KEYWORDS, callable->names.doc()};
  const pybind11::object name = module.attr("__name__");
  PyObject* made = PyCFunction_NewEx(&callable->method, pybind11::capsule(callable).ptr(), name.ptr());
  module.add_object(callable->names.function(), pybind11::reinterpret_steal<pybind11::object>(made));
}

template <class Result, class... Arguments>
struct NamedFunction {
  Names names;
  Result (*function)(Arguments...);
  PyMethodDef method;

  PyObject* call(PyObject* const* given, size_t count, PyObject* keywords) const {
    try {
      return names.ordered(given, count, keywords, [&](PyObject* const* arguments) {
        return converted(arguments, std::index_sequence_for<Arguments...>());
      });
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  // Without pybind11's own way from a call to a function, which is made for overloads and costs a third of a
  // microsecond.
  template <size_t... I>
  PyObject* converted(PyObject* const* arguments, std::index_sequence<I...>) const {
    std::tuple<pybind11::detail::make_caster<Arguments>...> casters;
    size_t at = 0;
    // None is converted to no object: for a reference that is none at all.
    if (!((at = I, std::get<I>(casters).load(arguments[I], arguments[I] != Py_None)) && ...)) {
      return PyErr_Format(PyExc_TypeError, "%s: %s: got %R, which is of another type", names.function(),
                          names.name(at).c_str(), arguments[at]);
    }
    if constexpr (std::is_void_v<Result>) {
      function(pybind11::detail::cast_op<Arguments>(std::move(std::get<I>(casters)))...);
      Py_RETURN_NONE;
    } else if constexpr (std::is_base_of_v<pybind11::object, Result>) {
      return function(pybind11::detail::cast_op<Arguments>(std::move(std::get<I>(casters)))...).release().ptr();
    } else {
      const Result result = function(pybind11::detail::cast_op<Arguments>(std::move(std::get<I>(casters)))...);
      return pybind11::cast(result).release().ptr();
    }
  }
};

// Adds `function`; `signature` names its arguments in their order.
template <class Result, class... Arguments>
void def_named(pybind11::module_& module, const char* name, Result (*function)(Arguments...), const char* signature) {
  auto* named = new NamedFunction<Result, Arguments...>{{name, signature}, function, PyMethodDef{}};
  if (named->names.size() != sizeof...(Arguments)) {
    throw std::logic_error(std::string(name) + ": its signature names more or fewer arguments than it has");
  }
  add_callable(module, named);
}

// A struct whose fields are given by name, as one argument of a function. `fields(visit)` of the struct calls
// visit("name", field) for each. To Python it is a tuple, of what tells the groups apart and the fields as they were
// given; the call that takes the group converts them.
template <class Fields>
struct Group {
  Names names;
  PyMethodDef method;

  PyObject* call(PyObject* const* given, size_t count, PyObject* keywords) const {
    return names.ordered(given, count, keywords, [&](PyObject* const* arguments) {
      PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(names.size() + 1));
      if (tuple == nullptr) return tuple;
      Py_INCREF(kind);
      PyTuple_SET_ITEM(tuple, 0, kind);
      for (size_t i = 0; i < names.size(); ++i) {
        Py_INCREF(arguments[i]);
        PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(i + 1), arguments[i]);
      }
      return tuple;
    });
  }

  inline static PyObject* kind = nullptr;
};

template <class Fields>
void def_group(pybind11::module_& module, const char* name) {
  std::string signature = "*";
  Fields().fields([&](const char* field, auto&) { signature += std::string(", ") + field; });
  Group<Fields>::kind = PyUnicode_FromString(name);
  add_callable(module, new Group<Fields>{{name, signature}, PyMethodDef{}});
}

// Reads a group in a caster of pybind11.
template <class Fields>
struct GroupCaster {
  PYBIND11_TYPE_CASTER(Fields, pybind11::detail::const_name("group"));

  bool load(pybind11::handle source, bool convert) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) == 0) return false;
    if (PyTuple_GET_ITEM(source.ptr(), 0) != Group<Fields>::kind) return false;
    Py_ssize_t i = 0;
    bool loaded = true;
    value.fields([&](const char*, auto& field) {
      pybind11::detail::make_caster<std::decay_t<decltype(field)>> caster;
      loaded = loaded && caster.load(PyTuple_GET_ITEM(source.ptr(), ++i), convert);
      if (loaded) field = pybind11::detail::cast_op<std::decay_t<decltype(field)>>(std::move(caster));
    });
    return loaded;
  }
};

}  // namespace ela::binding
